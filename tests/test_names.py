"""Names of the package: what it offers, and where programs that were written for its former modules find theirs."""

import pytest

import d2l_lib as d2l


def test_a_name_that_was_never_there():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = d2l.nonsense


@pytest.mark.parametrize("name", d2l._FORMER)
def test_former_modules_are_found_where_their_names_are_now(name):
    former = getattr(d2l, name)
    for place in d2l._FORMER[name]:
        if not place.startswith("d2l"):
            module = d2l.import_module(f"d2l_lib.{place}")
            own = next(one for one in vars(module).values() if getattr(one, "__module__", "") == module.__name__)
            assert getattr(former, own.__name__) is own
    with pytest.raises(AttributeError, match="its names are now in"):
        _ = former.nonsense


def test_the_main_of_a_former_module_is_the_command(capsys):
    with pytest.raises(SystemExit) as ended:
        d2l.slurm.main(["--nodes", "-1"])
    assert ended.value.code == 2 and "--nodes" in capsys.readouterr().err
