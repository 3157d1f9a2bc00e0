#!/bin/sh
# Leaves out of a virtual environment what no service needs at run time: installers, tests, type stubs, symbols.
set -eu
site=$(echo "$1"/lib/python3*/site-packages)
rm -rf "$site"/hatchling* "$site"/editables* "$site"/pathspec* "$site"/pluggy* "$site"/trove_classifiers* "$site"/pkg_resources
rm -rf "$site"/pip "$site"/pip-*.dist-info "$site"/setuptools "$site"/setuptools-*.dist-info "$1"/bin/pip*
find "$site" -depth -type d \( -name tests -o -name test -o -name testing \) -path '*/numpy/*' -prune -exec rm -rf {} +
find "$site" -depth -type d \( -name __pycache__ -o -path '*/onnx/backend/test' -o -path '*/onnx/test' -o -path '*/sympy' -o -path '*/mpmath' \) -exec rm -rf {} +
# ONNX Runtime's C library: the Python module has the same code inside.
rm -f "$site"/onnxruntime/capi/libonnxruntime.so.*
find "$site" -type f \( -name '*.pyi' -o -name '*.a' -o -name '*.c' -o -name '*.h' -o -name '*.hpp' -o -name '*.proto' -o -name '*.in' \) -delete
