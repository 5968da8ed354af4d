"""What MkDocs does beside its configuration: results of benchmarks, which lie outside `docs`, become pages."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

_RESULTS = Path(__file__).parents[1] / "benchmarks/results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the results, reached from the pages that link to them."""
    for path in sorted(_RESULTS.glob("*.md")):
        file = File.generated(config, f"results/{path.name}", abs_src_path=str(path))
        file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to results, as they are in the repository, become links within the site."""
    markdown = markdown.replace("](../benchmarks/results/", "](results/")
    if page.file.src_uri.startswith("results/"):
        # The benchmarks' own scripts and recipes are in the repository alone.
        return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)
    return markdown
