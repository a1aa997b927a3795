"""Where tests run side by side, those of exported graphs have a process of their own (test_apart.py).

onnxruntime ends a process in which some of the other libraries of the suite were at work before.
"""

import os

collect_ignore = ["test_export.py"] if "PYTEST_XDIST_WORKER" in os.environ else ["test_apart.py"]
