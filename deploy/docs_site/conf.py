"""Sphinx's configuration. Sphinx runs this file; the pages are Markdown, with the headings' anchors as on GitHub."""

project = "Durable LLM inference"
html_title = project
extensions = ["myst_parser"]
myst_heading_anchors = 4
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_use_index = False
html_domain_indices = False
# Text is as it stands in the repository.
smartquotes = False
# Nothing is fetched from elsewhere, and the search works without a server.
html_baseurl = ""
# Some blocks show a part of a JSON text, or an answer with a comment. A part of a page has no title of its own.
suppress_warnings = ["misc.highlighting_failure", "myst.header"]
