"""The documentation site, made by Sphinx from the Markdown files of this folder: `make docs`.

The files are plain Markdown that reads well without the site too. A link or an anchor that leads nowhere is an error,
and so is a page that no table of contents names. The pages load nothing from another host: they can be read offline.
"""

project = "Ticketrail"
author = "The Ticketrail authors"
copyright = "the Ticketrail authors"

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["api"]
root_doc = "index"
nitpicky = True
# Console output and JSON with an ellipsis are not valid code of their language, so they have no colours.
suppress_warnings = ["misc.highlighting_failure"]

myst_heading_anchors = 3

html_theme = "furo"
html_title = "Ticketrail"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
templates_path: list[str] = []
