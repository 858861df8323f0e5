"""The documentation site: `make docs` builds it, and a broken link fails the build."""

project = "labelfleet"
copyright = "the labelfleet authors, Apache-2.0"
extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4  # [text](page.md#a-heading) is checked, too
suppress_warnings = ["misc.highlighting_failure"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "labelfleet"
html_static_path: list[str] = []
html_copy_source = False
html_show_sphinx = False
