"""Commands that make the results we claim, one file each."""
