"""Check an ONNX file: `python -m alveary_registry.check_onnx PATH`; exits non-zero and says why when it is not valid."""

from __future__ import annotations

import sys


def main(path: str) -> None:
    """Raise what onnx.checker or ONNX Runtime has against the file."""
    import onnx
    import onnxruntime

    onnx.checker.check_model(path, full_check=True)
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main(sys.argv[1])
