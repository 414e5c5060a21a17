"""What MkDocs needs for pages that are also read as files: README as the start, and links that stay inside the site."""

import re
from pathlib import Path

ROOT = Path(__file__).parent
LINK = re.compile(r"\[([^\]]+)\]\((?!https?://|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Add README as the site's first page."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Let the links of a page lead to pages of the site."""
    return keep_inside(markdown, ROOT if page.file.src_uri == "index.md" else ROOT / "docs")


def keep_inside(markdown: str, folder: Path) -> str:
    """The text with its links relative to `docs/`; one to a file elsewhere in the repository becomes its path."""

    def change(match: re.Match) -> str:
        target = (folder / match[2]).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return f"[{match[1]}]({target.relative_to(ROOT / 'docs')}{match[3] or ''})"
        return f"`{target.relative_to(ROOT)}`" if target.is_relative_to(ROOT) else match[1]

    return LINK.sub(change, markdown)
