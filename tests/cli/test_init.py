"""`dimat init` writes a config file to start from."""

from types import SimpleNamespace

import pytest

from dimat_jax._option_facts import facts
from dimat_jax.cli import _bundled, _init
from dimat_jax.cli._field_texts import texts_of
from dimat_jax.config import ROOT, check, fields_of, resolved
from dimat_jax.errors import UserError
from dimat_jax.options import every, read

LIKE = [
    "quickstart",
    "quickstart:cga",
    "quickstart:fedprox",
    "cifar100_resnet20",
    "cifar100_resnet20:small-wa",
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(monkeypatch, *arguments: str, like: str = "quickstart") -> None:
    monkeypatch.setattr(_init.flags, "FLAGS", SimpleNamespace(like=like))
    _init.main(list(arguments))


def assigned(text: str) -> dict[str, str]:
    """The comment before each field that a file sets, in one line."""
    found, comment = {}, list[str]()
    for line in text.partition("default_config()\n\n")[2].splitlines():
        assert len(line) <= 88
        if line.startswith("    # "):
            comment.append(line.removeprefix("    # "))
        elif line.startswith("    config."):
            path = line.removeprefix("    config.").partition(" = ")[0]
            found[path], comment = " ".join(comment), []
    return found


@pytest.mark.parametrize("like", LIKE)
def test_the_file_has_the_values_of_another_config_and_a_comment_on_each_field(
    monkeypatch, capsys, folder, like
):
    init(monkeypatch, "sub/mine.py", like=like)
    assert capsys.readouterr().out.startswith("wrote sub/mine.py; ")
    config, expected = map(_bundled.load_config, ("sub/mine.py", like))
    check(config)
    fields = fields_of(expected)
    assert fields_of(config) == fields
    text = (folder / "sub" / "mine.py").read_text()
    comments, described = assigned(text), facts(ROOT)
    for option in every(ROOT):
        differs = fields[option.path] != option.default
        is_read = option.path in read(ROOT, resolved(fields))
        if is_read and (differs or option.path in _init.MOST_USED):
            texts = texts_of(option, described[option.path])
            expected_comment = " ".join(t for t in texts if t != "Read: always")
            assert comments.pop(option.path) == expected_comment
    assert not comments
    assert "    dimat train --config=sub/mine.py --workdir=runs/mine\n" in text


def test_the_fields_that_are_used_most_exist():
    assert set(_init.MOST_USED) <= {option.path for option in every(ROOT)}
    assert len(set(_init.MOST_USED)) == len(_init.MOST_USED)


def test_no_file_is_replaced_even_if_it_appears_at_the_last_moment(monkeypatch, folder):
    init(monkeypatch)
    written = (folder / "my_config.py").read_text()
    with pytest.raises(UserError, match="FILE=my_config.py exists already"):
        init(monkeypatch)

    (folder / "link.py").symlink_to("nowhere.py")
    with pytest.raises(UserError, match="FILE=link.py exists already"):
        init(monkeypatch, "link.py")

    def meanwhile(config, path, like):
        (folder / path).write_text("theirs")
        return "ours"

    monkeypatch.setattr(_init, "content", meanwhile)
    with pytest.raises(
        UserError, match="other.py: File exists; .*No file has been repl"
    ):
        init(monkeypatch, "other.py")
    assert (folder / "other.py").read_text() == "theirs"
    assert (folder / "my_config.py").read_text() == written


@pytest.mark.parametrize("name", ['a "quote".py', "a\\b.py", "it's.py", '"""\n.py'])
def test_the_file_can_be_read_whatever_its_name_is(monkeypatch, name):
    init(monkeypatch, name)
    assert _bundled.load_config(name) == _bundled.load_config("quickstart")


def test_a_file_that_names_things_of_plugins_says_which_plugins(monkeypatch, folder):
    named = SimpleNamespace(module="my_lab.graphs")
    monkeypatch.setattr(_init, "from_plugins", lambda config: [named, named])
    init(monkeypatch)
    text = (folder / "my_config.py").read_text()
    assert "--workdir=runs/my_config --plugin=my_lab.graphs\n" in text
