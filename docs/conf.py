"""How Sphinx builds the site: `make docs`."""

import fi_prefetch

project = "fi_prefetch"
author = "the fi_prefetch developers"
release = version = fi_prefetch.__version__
html_title = f"fi_prefetch {release.partition('+')[0]}"
html_theme = "furo"
html_show_copyright = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
# Docstrings are written with one backtick around names.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
