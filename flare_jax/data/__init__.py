"""Reading and keeping data: file readers and the cache of generated samples."""
