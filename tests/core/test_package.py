"""Laws of the package: every public name loads, importing it is quick, and the PEFT method is there when needed."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
from warm_programs import Warm

import so8t_core
from so8t_core.versions import check_version


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_every_public_name_loads() -> None:
    assert all(getattr(so8t_core, name) is not None for name in so8t_core.__all__)
    assert set(so8t_core.__all__) == set(so8t_core._MODULE_OF)


def test_errors_load_without_torch() -> None:
    assert _python("import sys, so8t_core.errors; print('torch' in sys.modules)") == "False"


def said(warm_python: Warm, code: str) -> str:
    done = warm_python.run("-c", "import sys; assert not {'peft', 'so8t_core'} & set(sys.modules)\n" + code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_method_is_registered_beside_a_loaded_peft_and_by_any_name(warm_python: Warm) -> None:
    check = "print('SO8T' in peft.utils.PeftType.__members__)"
    assert said(warm_python, f"import peft, so8t_core; {check}") == "True"
    names = "so8t_core.SO8TConfig; so8t_core.attach"
    assert said(warm_python, f"import so8t_core; {names}; import peft; {check}") == "True"
    assert said(warm_python, f"import peft; {check}") == "False"


def test_a_config_is_enough_for_get_peft_model_whatever_was_imported_first(warm_python: Warm) -> None:
    """so8t_core before peft, and no other name of it: the method was in PEFT's names but not in its tables."""
    code = "import so8t_core; so8t_core.SO8TConfig; import peft.mapping as m; "
    assert said(warm_python, code + "print('SO8T' in m.PEFT_TYPE_TO_TUNER_MAPPING)") == "True"


@pytest.mark.parametrize("version", ["0.20.3", "0.5.0"])
def test_an_old_peft_is_refused_with_the_reason(version: str) -> None:
    with pytest.raises(ValueError, match=f"peft {version} is too old: .* silently wrong; pip install"):
        check_version("peft", version)


@pytest.mark.parametrize("version", ["0.22.0", "1.0.0.dev0"])
def test_a_newer_peft_is_used_with_a_warning(version: str) -> None:
    with pytest.warns(UserWarning, match=f"peft {version} was not tested"):
        check_version("peft", version)


def test_the_tested_peft_is_used_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_version("peft", "0.21.2")
