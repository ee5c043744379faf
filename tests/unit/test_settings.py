"""Settings come from four places, in one order; each is converted and checked, and each error names its place."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from afterglow.errors import ConfigError
from afterglow.settings import ModelSettings, Settings, Upstream, load

SECRET = "sk-very-secret"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "afterglow.toml"


def from_file(file: Path, text: str, **environ: str) -> Settings:
    file.write_text(text)
    return load(environ=environ, config=file)


# --- where a value comes from ----------------------------------------------------------------------------------


def test_nothing_given_is_the_defaults():
    """Without flags, variables and file, every setting has its default."""
    assert load(environ={}) == Settings()


def test_a_flag_wins_over_a_variable_over_the_file_over_the_default(file: Path):
    """Each place gives way to the one before it."""
    file.write_text("port = 3\nhost = 'file'\ndata = 'file'")
    environ = {"AFTERGLOW_PORT": "2", "AFTERGLOW_HOST": "variable"}
    loaded = load({"port": "1"}, environ, file)
    assert (loaded.port, loaded.host, loaded.data) == (1, "variable", "file")
    assert loaded.default_model == ""


def test_a_flag_that_was_not_given_hides_nothing():
    """None is no value."""
    assert load({"port": None}, {"AFTERGLOW_PORT": "2"}).port == 2


def test_an_empty_variable_is_a_value(file: Path):
    """A variable set to nothing takes back what the file says."""
    loaded = from_file(
        file, "model_url = 'http://m/v1'\napi_keys = ['a']", AFTERGLOW_MODEL_URL="", AFTERGLOW_API_KEYS=""
    )
    assert (loaded.model_url, loaded.api_keys) == ("", ())


def test_only_our_own_variables_are_read():
    """What users set for their clients is not taken for ours."""
    assert load(environ={"OPENAI_BASE_URL": "http://127.0.0.1:8000/v1", "PORT": "1", "MODEL_KEY": SECRET}) == Settings()


@pytest.mark.parametrize("row", dataclasses.fields(Settings), ids=lambda row: row.name)
def test_every_setting_says_what_it_is(row: dataclasses.Field[Any]):
    """Each has a help text that is a sentence, and its unit in its name when it has one."""
    assert row.metadata["help"].endswith((".", ")"))
    ending = {"seconds": "_s", "milliseconds": "_ms", "MB": "_mb", "hours": "_h", "tokens": "_tokens"}
    assert row.name.endswith(ending.get(row.metadata["unit"], ""))


@pytest.mark.parametrize(
    "row", [row for row in dataclasses.fields(Settings) if row.name not in ("upstreams", "models")]
)
def test_every_default_can_be_given_as_text(row: dataclasses.Field[Any]):
    """The default of each setting, written into its variable, is itself again."""
    default = getattr(Settings(), row.name)
    text = ",".join(default) if isinstance(default, tuple | dict) else str(default)
    assert getattr(load(environ={f"AFTERGLOW_{row.name.upper()}": text}), row.name) == default


# --- conversions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("port", "0", 0),
        ("run_lease_s", "2.5", 2.5),
        ("run_lease_s", "3", 3.0),
        *(("passthrough", word, True) for word in ("1", "true", "True", "yes", "ON")),
        *(("passthrough", word, False) for word in ("0", "false", "no", "Off")),
        ("api_keys", "a, b:project ,,c", ("a", "b:project", "c")),
        ("aliases", "gpt-4o=qwen3:32b, o3 = x=y ", {"gpt-4o": "qwen3:32b", "o3": "x=y"}),
        ("model_url", "  ", "  "),
    ],
)
def test_text_is_converted(name: str, text: str, value: Any):
    """Variables hold text; each becomes what its setting is."""
    assert getattr(load(environ={f"AFTERGLOW_{name.upper()}": text}), name) == value


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("port = 81", "port", 81),
        ("run_lease_s = 3", "run_lease_s", 3.0),
        ("passthrough = false", "passthrough", False),
        ("passthrough = 'off'", "passthrough", False),
        ("api_keys = ['a,b', 'c']", "api_keys", ("a,b", "c")),
        ("api_keys = 'a,b'", "api_keys", ("a", "b")),
        ("[aliases]\ngpt-4o = 'x'", "aliases", {"gpt-4o": "x"}),
        ("aliases = 'gpt-4o=x'", "aliases", {"gpt-4o": "x"}),
    ],
)
def test_toml_is_taken_as_it_is(file: Path, text: str, name: str, value: Any):
    """The file may use TOML's own kinds, or the text that a variable would hold."""
    assert getattr(from_file(file, text), name) == value


def test_repeated_flags_make_one_table():
    """`--alias` may be given several times, each with several pairs."""
    assert load({"aliases": ["a=b,c=d", "e=f"]}, {}).aliases == {"a": "b", "c": "d", "e": "f"}


def test_upstreams_and_models_are_tables(file: Path):
    """Model servers, with keys from the environment, and what is known of models."""
    loaded = from_file(
        file,
        """
        [upstreams.big]
        url = "http://big/v1"
        key_env = "BIG_KEY"
        models = ["a", "b"]
        max_concurrency = 4
        inline_images = true
        [upstreams.small]
        url = "http://small/v1"
        [models."big/a"]
        window_tokens = 128000
        vision = false
        """,
        BIG_KEY=SECRET,
    )
    assert loaded.upstreams == {
        "big": Upstream("big", "http://big/v1", SECRET, ("a", "b"), 4, True),
        "small": Upstream("small", "http://small/v1"),
    }
    assert loaded.models == {"big/a": ModelSettings(window_tokens=128000, vision=False)}


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("port", "eighty", "expected a whole number, got 'eighty'"),
        ("port", "", "expected a whole number, got ''"),
        ("port", "8.0", "expected a whole number, got '8.0'"),
        ("run_lease_s", "soon", "expected a number, got 'soon'"),
        ("run_lease_s", "nan", "expected a number, got 'nan'"),
        ("run_lease_s", "inf", "expected a number, got 'inf'"),
        ("passthrough", "maybe", "expected on or off, got 'maybe'"),
        ("aliases", "gpt-4o", "expected OLD=NEW, got 'gpt-4o'"),
        ("aliases", "gpt-4o=", "expected OLD=NEW, got 'gpt-4o='"),
    ],
)
def test_a_wrong_variable_is_named(name: str, text: str, expected: str):
    """The error says which variable, what was expected, and what came."""
    variable = f"AFTERGLOW_{name.upper()}"
    with pytest.raises(ConfigError) as error:
        load(environ={variable: text})
    assert str(error.value) == f"{variable}: {expected}."


def test_a_wrong_flag_is_named():
    """The error names the flag as it is typed."""
    with pytest.raises(ConfigError, match=r"^--root-path: expected text, got a int\.$"):
        load({"root_path": 5}, {})
    with pytest.raises(ConfigError, match=r"^--port: expected a whole number, got 'x'\.$"):
        load({"port": "x"}, {"AFTERGLOW_PORT": "1"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("port = 80.5", "port in {file}: expected a whole number, got 80.5"),
        ("port = true", "port in {file}: expected a whole number, got True"),
        ("port = [1]", "port in {file}: expected a whole number, got [1]"),
        ("run_lease_s = [1]", "run_lease_s in {file}: expected a number, got [1]"),
        ("run_lease_s = true", "run_lease_s in {file}: expected a number, got True"),
        ("run_lease_s = nan", "run_lease_s in {file}: expected a number, got nan"),
        ("host = 5", "host in {file}: expected text, got a int"),
        ("passthrough = 2", "passthrough in {file}: expected on or off, got 2"),
        ("api_keys = 5", "api_keys in {file}: expected texts, as a list or comma-separated"),
        ("api_keys = ['a', 5]", "api_keys in {file}: expected texts, as a list or comma-separated"),
        ("aliases = 5", "aliases in {file}: expected texts, as a list or comma-separated"),
        ("[aliases]\na = 5", "aliases in {file}: expected texts, as a list or comma-separated"),
        ("prot = 80", "{file}: unknown setting 'prot'. `afterglow serve --help` and docs/configuration.md list them"),
        ("upstreams = 5", "upstreams: expected tables named [upstreams.NAME]"),
        ("[upstreams]\nbig = 'http://big'", "upstreams: expected tables named [upstreams.NAME]"),
        ("[models]\nbig = 5", "models: expected tables named [models.NAME]"),
    ],
)
def test_a_wrong_line_of_the_file_is_named(file: Path, text: str, expected: str):
    """The error says which setting of which file, whatever kind of value stands there."""
    with pytest.raises(ConfigError) as error:
        from_file(file, text)
    assert str(error.value) == expected.format(file=file) + "."


@pytest.mark.parametrize(
    "table",
    [
        "",
        "url = 5",
        "url = 'u'\nmodels = 'a'",
        "url = 'u'\nmodels = [5]",
        "url = 'u'\nmax_concurrency = '4'",
        "url = 'u'\nmax_concurrency = true",
        "url = 'u'\ninline_images = 1",
        "url = 'u'\nkey_env = 5",
        "url = 'u'\nkey = 'k'",
    ],
)
def test_a_wrong_upstream_is_named(file: Path, table: str):
    """The error names the upstream, and what it takes."""
    with pytest.raises(ConfigError, match=r"^\[upstreams\.big\] takes url \(needed\) and key_env, "):
        from_file(file, f"[upstreams.big]\n{table}")


def test_a_key_that_is_not_set_is_named(file: Path):
    """An upstream whose key variable is missing is refused, with the variable's name."""
    with pytest.raises(ConfigError, match=r"^\[upstreams\.big\]: the variable BIG_KEY named by key_env is not set\.$"):
        from_file(file, "[upstreams.big]\nurl = 'http://big/v1'\nkey_env = 'BIG_KEY'")


@pytest.mark.parametrize(
    "line", ["window = 5", "window_tokens = '8k'", "window_tokens = 0", "vision = 1", "tools = 'on'"]
)
def test_a_wrong_model_is_named(file: Path, line: str):
    """The error names the model, and what may be said of one."""
    with pytest.raises(ConfigError, match=r'^\[models\."a/b"\] takes window_tokens and max_output_tokens, '):
        from_file(file, f'[models."a/b"]\n{line}')


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("log_format", "xml", "log_format: expected text or json, got 'xml'."),
        ("log_level", "loud", "log_level: expected debug or info or warning or error, got 'loud'."),
        ("history", "all", "history: expected calls or messages, got 'all'."),
        ("port", "65536", "port: must be between 0 and 65535."),
        ("port", "-1", "port: must be between 0 and 65535."),
        ("run_lease_s", "0", "run_lease_s: must be more than 0."),
        ("max_running_runs", "-5", "max_running_runs: must be more than 0."),
        ("first_token_timeout_s", "0", "first_token_timeout_s: must be more than 0."),
        ("event_retention_h", "0", "event_retention_h: must be more than 0."),
        ("model_retries", "-1", "model_retries: must not be less than 0."),
    ],
)
def test_a_value_out_of_range_is_named(name: str, text: str, expected: str):
    """A value of the right kind that cannot work is refused at the start."""
    with pytest.raises(ConfigError) as error:
        load(environ={f"AFTERGLOW_{name.upper()}": text})
    assert str(error.value) == expected


def test_a_file_that_cannot_be_read_is_named(file: Path, tmp_path: Path):
    """A file that is missing, a folder, or no TOML: the error names it and says what is wrong."""
    with pytest.raises(ConfigError, match=r"The configuration file .*afterglow\.toml cannot be read: No such file"):
        load(environ={}, config=file)
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory"):
        load(environ={}, config=tmp_path)
    with pytest.raises(ConfigError, match=r"The configuration file .*afterglow\.toml is no TOML: .*line 1"):
        from_file(file, "port: 80")
    file.write_bytes(b"host = '\xff'")
    with pytest.raises(ConfigError, match=r"The configuration file .*afterglow\.toml is no TOML: "):
        load(environ={}, config=file)


# --- secrets ---------------------------------------------------------------------------------------------------


def test_secrets_are_not_shown(file: Path):
    """Neither the settings nor what they hold show a key when they are printed."""
    loaded = from_file(
        file,
        f"model_key = '{SECRET}'\napi_keys = ['{SECRET}']\n[upstreams.big]\nurl = 'u'\nkey_env = 'BIG_KEY'",
        BIG_KEY=SECRET,
    )
    assert (loaded.model_key, loaded.api_keys, loaded.upstreams["big"].key) == (SECRET, (SECRET,), SECRET)
    assert SECRET not in repr(loaded)
    assert SECRET not in f"{loaded} {loaded.upstreams}"


@pytest.mark.parametrize("line", ["model_key = ['{}']", "api_keys = [['{}']]", "api_keys = {{ a = '{}' }}"])
def test_a_wrong_secret_is_not_shown(file: Path, line: str):
    """The error about a key tells its place, not the key."""
    with pytest.raises(ConfigError) as error:
        from_file(file, line.format(SECRET))
    assert str(file) in str(error.value)
    assert SECRET not in str(error.value)
