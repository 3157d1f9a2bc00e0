"""The service that ALVEARY_MODULE names: what an image starts, which has no shell. `python -m alveary_core.start`."""

import os
import runpy

if __name__ == "__main__":
    runpy.run_module(os.environ["ALVEARY_MODULE"], run_name="__main__", alter_sys=True)
