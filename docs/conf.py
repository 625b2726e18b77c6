"""Sphinx's configuration: ``make docs`` builds the site, and no warning passes."""

from __future__ import annotations

import sys
import warnings
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "bnrestructure"
author = "the bnrestructure developers"
release = metadata.version("bnrestructure")
version = release.split("+")[0]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
    "docstrings",
    "generated",
    "from_root",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build", "generated", "pictures", "gallery/*.ipynb"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nitpicky = False

html_theme = "furo"
html_title = "bnrestructure"
html_static_path = ["_static", "pictures"]
html_css_files = ["graphs.css"]
html_show_sphinx = False
html_show_copyright = False

autodoc_member_order = "bysource"
autodoc_mock_imports = [] if find_spec("lightning") else ["lightning", "pytorch_lightning"]
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88

# Only what is in this repository can be checked without a network.
linkcheck_ignore = [r"https?://.*"]

# What runs in seconds on two cores and needs no package beside those of the tests is run, the rest is shown.
_SHOWN = {"lightning": "lightning", "accelerate": "accelerate", "trainer": "transformers", "timm": "timm"}
_MISSING = "|".join(name for name, package in _SHOWN.items() if find_spec(package) is None) or "$^"
sphinx_gallery_conf = {
    "examples_dirs": ["../examples"],
    "gallery_dirs": ["gallery"],
    "filename_pattern": rf"^(?!.*/({_MISSING})\w*\.py)",
    "ignore_pattern": r"^(__init__|photos|demo|tiny|test_\w+)\.py",
    "download_all_examples": False,
    "show_memory": False,
    "min_reported_time": 0,
    "remove_config_comments": True,
    "write_computation_times": False,
    "within_subsection_order": "FileNameSortKey",
    "reset_modules": (),
    "default_thumb_file": str(HERE / "pictures" / "thumbnail.png"),
    "image_scrapers": ("matplotlib", "written.pictures"),
    "backreferences_dir": None,
}
warnings.filterwarnings("ignore", category=UserWarning, message=".*non-GUI backend.*")
suppress_warnings = ["config.cache"]
