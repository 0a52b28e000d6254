"""Nothing that names a secret leaves it readable, in whatever it stands."""

import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segdistill.engine.tracker import JsonLinesTracker
from segdistill.secrets import MaskingFilter, is_secret, masked

NAMES = (
    "password", "passwords", "PASSWORD", "db_password", "remote.password", "MLFLOW_TRACKING_PASSWORD", "secret",
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "X-Amz-Security-Token", "X-Amz-Signature", "apiKey", "api-key",
    "access_token", "secretAccessKey", "credentials", "userpassword",
)  # fmt: skip
# What a password may be made of without ending the pair it stands in.
SECRETS = st.text("abcXYZ0189!$%^*+~|._-", min_size=6, max_size=20).map(lambda text: f"hush{text}")
FRAMES = (
    "{name}={secret}", "--{name}={secret}", "--{name} {secret}", "{name}: {secret}", '{{"{name}": "{secret}"}}',
    "{{'{name}': '{secret} with blanks'}}", "https://host/path?a=1&{name}={secret}&b=2",
    "https://host/path?{name}={secret}", "{{'url': 'http://host/?{name}={secret}'}}",
    "run -x 1 --{name} '{secret} b'",
    "before https://user:{secret}@host:80/a?b=c behind", "a https://{secret}@host and ssh://u:{secret}@other/x",
    "postgresql+psycopg2://u:{secret}/{secret}@h/db", "Authorization: Bearer {secret}", "no route (http://u:{secret}@h/)",
)  # fmt: skip


@settings(deadline=None)
@given(
    st.sampled_from(NAMES),
    SECRETS,
    st.sampled_from(FRAMES),
    st.sampled_from(["", "a sentence ", "x=1, ", "failed: ", "x=y: "]),
)
def test_a_secret_is_masked_wherever_it_stands(name: str, secret: str, frame: str, before: str) -> None:
    text = before + frame.format(name=name, secret=secret)
    for value in (text, [text], {"a": {"b": (text,)}}):
        assert "hush" not in str(masked(value)), masked(value)
    assert masked(text).startswith(before)
    for value in (secret, [secret], {"any": secret}):
        assert "hush" not in str(masked(value, name))
        assert "hush" not in str(masked({name: value}))
    assert "hush" not in str(masked(["run", f"--{name}", secret]))


@settings(deadline=None)
@given(st.text(max_size=60))
def test_masking_is_total_and_masking_twice_changes_nothing(text: str) -> None:
    assert masked(masked(text)) == masked(text)


@pytest.mark.parametrize(
    "text",
    ["s3://bucket/a@2/b", "https://host:8080/path@v1", "a@b.example", "tokens=4", "cls_token", "lr: 0.1, steps=5",
     "git@host:team/data.git", "DeepLabV3Plus (tu-resnet18)", "12:30:01 done", "https://host/x?page=2"],
)  # fmt: skip
def test_what_is_no_secret_stays_as_it_is(text: str) -> None:
    assert masked(text) == text


def test_the_lines_of_a_run_have_no_secrets(tmp_path: Path) -> None:
    tracker = JsonLinesTracker(tmp_path / "run.jsonl")
    tracker.params({"url": "see https://u:hush@h/x", "passwords": ["hush"]})
    tracker.tags({"command": "run --token=hush"})
    tracker.close()
    assert "hush" not in (tmp_path / "run.jsonl").read_text()


def test_names_of_sizes_keep_their_numbers_and_passwords_do_not() -> None:
    assert masked({"tokens": "four", "token_dim": 64, "class_token": True}) == {
        "tokens": "four", "token_dim": 64, "class_token": True
    }  # fmt: skip
    assert masked(12345678, "password") == "***"
    assert not is_secret("experiments.kd.methods")


def test_what_a_library_logs_is_masked_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.addFilter(MaskingFilter())
    try:
        raise ValueError("no way to http://u:hush@h")
    except ValueError:
        logging.getLogger("library").exception("asked %s", "http://u:hush@h/api")
    assert "hush" not in caplog.text
    assert "http://h/api" in caplog.text and "ValueError" in caplog.text


def test_an_empty_list_has_no_secret() -> None:
    """Such as the methods of the undistilled student."""
    assert masked({"methods": [], "betas": ()}) == {"methods": [], "betas": []}
