"""Makes the site's results page of experiments/README.md, with the files it links to."""

import re
from pathlib import Path

from mkdocs.structure.files import File

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def on_files(files, config):
    text = (EXPERIMENTS / "README.md").read_text().replace("](../docs/", "](")
    for target in sorted(set(re.findall(r"\]\(([^):#]+)\)", text))):
        if (EXPERIMENTS / target).is_file():
            path = str((EXPERIMENTS / target).resolve())
            files.append(File.generated(config, f"experiments/{target}", abs_src_path=path))
            text = text.replace(f"]({target})", f"](experiments/{target})")
    text = text.replace("](results)", "](experiments/results)").replace(
        "[results/](experiments/results)", "`experiments/results/`"
    )
    files.append(File.generated(config, "results.md", content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Pages link to the repository's files: the results page, and what that page links to."""
    markdown = markdown.replace("](../experiments/README.md)", "](results.md)")
    return markdown.replace("](../experiments/", "](experiments/")
