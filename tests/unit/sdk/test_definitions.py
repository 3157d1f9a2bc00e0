"""Definitions are had from scripts that would train if they were run, and nothing else of them is executed."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from alveary import _definitions
from alveary._definitions import NotDefined, script_module

Script = Callable[..., ModuleType]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    """A script of a source directory, with others beside it, as a module; `done.txt` there is what it did."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    _definitions.install(tmp_path)

    def make(code: str, **others: str) -> ModuleType:
        (tmp_path / "train.py").write_text(DOES + textwrap.dedent(code))
        for name, text in others.items():
            file = tmp_path / f"{name.replace('__', '/')}.py"
            file.parent.mkdir(exist_ok=True, parents=True)
            file.write_text(DOES + textwrap.dedent(text))
        importlib.invalidate_caches()
        return script_module(tmp_path / "train.py", tmp_path)

    yield make
    for name in set(sys.modules) - before:
        del sys.modules[name]
    assert not (tmp_path / "done.txt").exists(), (tmp_path / "done.txt").read_text()


# `does` stands for training, registering, logging: a test fails where it is ever called.
DOES = """
def does(*what):
    open("done.txt", "a").write(f"{what}")
    return what
"""


def test_a_class_with_what_it_is_made_of(script: Script) -> None:
    module = script("""
        import math as m, json
        from dataclasses import dataclass, field
        from collections import OrderedDict
        import nothing_that_is_installed
        SIZE = 3
        SIZES = [SIZE, SIZE + 1]
        SIZES.append(9)
        TABLE = {}
        TABLE["relu"] = m.sqrt
        model = does("train")
        SIZE2, _ = SIZE * 2, does
        class Base:
            def size(self): return helper() + SIZE2
        def helper(): return SIZES[-1]
        @dataclass
        class Net(Base):
            width: int = SIZE
            names: list = field(default_factory=list)
            def forward(self, x):
                model = x
                return TABLE["relu"](model) + self.size()
        for epoch in range(3):
            loss = does("epoch", epoch)
        net = Net()
        while does("forever"):
            pass
        does("register")
        """)
    net = module.Net(5)
    assert (net.width, net.names, net.forward(16)) == (5, [], 4 + 9 + 6)
    assert module.Net is module.Net
    assert set(vars(module)) & {"model", "epoch", "loss", "net", "json"} == set()


def test_definitions_inside_of_conditions_and_the_main_guard(script: Script) -> None:
    module = script("""
        import sys
        does("here")
        try:
            import nothing_that_is_installed as fast
        except ImportError:
            fast = None
        if sys.version_info > (3,):
            class Block:
                fast = fast
        else:
            class Block: pass
        with open(__file__) as opened:
            TEXT = opened.readline()
        for name in ("a", "b"):
            ALL = name
        if __name__ == "__main__":
            class Net(Block):
                text, last = TEXT, ALL
            does("train")
        """)
    assert module.Net.fast is None and module.Net.last == "b" and module.Net.text == "\n"


def test_arguments_of_the_command_line_have_their_defaults(script: Script) -> None:
    module = script("""
        import argparse
        parser = argparse.ArgumentParser()
        parser.add_argument("--width", type=int, default=7)
        parser.add_argument("--fast", action="store_true")
        args = parser.parse_args()
        class Net:
            width = args.width
        does(args)
        """)
    assert module.Net.width == 7


def test_registries_are_filled(script: Script) -> None:
    module = script("""
        LAYERS = {}
        def layer(cls):
            LAYERS[cls.__name__] = cls
            return cls
        @layer
        class One: pass
        @layer
        class Two: pass
        class Net:
            def parts(self): return sorted(LAYERS), globals()["Three"]
        class Three: pass
        does("train")
        """)
    assert module.Net().parts() == (["One", "Two"], module.Three)


def test_modules_of_the_source_are_sliced_as_well(script: Script) -> None:
    module = script(
        """
        from lib.nets import Net
        from helpers import *
        import lib.nets
        does("train")
        class Big(Net):
            scale = scaled(2)
            other = lib.nets.Other
        """,
        lib____init__="does('package')",
        lib__nets="""
        from . import blocks
        from .blocks import Block as B
        does("module")
        class Other: pass
        class Net(B):
            kind = blocks.KIND
        """,
        lib__blocks="""
        KIND = "block"
        class Block:
            pass
        """,
        helpers="""
        FACTOR = 10
        result = does("helpers")
        def scaled(x): return x * FACTOR
        """,
    )
    assert module.Big.scale == 20 and module.Big.kind == "block" and module.Big.other.__name__ == "Other"
    assert importlib.import_module("lib.blocks").Block in module.Big.__mro__


def test_a_module_that_only_defines_is_imported_as_it_is(script: Script) -> None:
    module = script("from model import Net; does('train')", model="class Net: pass\nclass Other: pass")
    assert module.Net.__name__ == "Net" and "Other" in vars(sys.modules["model"])


def test_a_guarded_script_is_imported_where_its_names_cannot_be_seen(script: Script) -> None:
    module = script("""
        for name in ("A", "B"):
            globals()[name] = type(name, (), {})
        if __name__ == "__main__":
            does("train")
        """)
    assert module.B.__name__ == "B"


def test_a_guarded_script_that_ends_itself_is_sliced(script: Script) -> None:
    module = script("""
        import sys
        class Net: pass
        if len(sys.argv) < 2:
            sys.exit("usage: train.py DATA")
        if __name__ == "__main__":
            does("train")
        """)
    assert module.Net.__name__ == "Net"


def test_future_annotations_and_annotations_of_what_is_not_there(script: Script) -> None:
    file = script("""
        does("train")
        class Net:
            def forward(self, x: nothing.There) -> "Other":
                return Other()
        class Other: pass
        """)
    (Path(str(file.__file__))).write_text("from __future__ import annotations\n" + Path(str(file.__file__)).read_text())
    del sys.modules["__alveary_main__"]
    module = script_module(Path(str(file.__file__)), Path.cwd())
    assert type(module.Net().forward(1)).__name__ == "Other"


def test_what_only_running_gives_is_said(script: Script) -> None:
    module = script("""
        import json
        config = json.loads(open("config.json").read())
        class Net:
            width = config["width"]
        does("train")
        """)
    with pytest.raises(NotDefined, match=r"Net cannot be had without running train.py: line 7 of train.py: FileNotFoundError.*config.json"):
        _ = module.Net


def test_a_name_that_nothing_defines(script: Script) -> None:
    module = script("does('train')")
    with pytest.raises(AttributeError, match=r"train.py defines no 'Net'"):
        _ = module.Net
