"""The page of a diagnosis in a real browser without a screen: it needs no other file, and shows all."""

import json
import shutil
import subprocess

import pytest

from lora_limits.diagnose import page, picture
from lora_limits.diagnose.summary import headline
from tests.support import ROOT
from tests.support.tools import all_extras

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = "apt-get install chromium"

pytestmark = pytest.mark.slow


@pytest.fixture
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None and all_extras():
        pytest.fail(f"LORA_LIMITS_ALL_EXTRAS=1, but no browser is here; install one: {INSTALL}")
    if found is None:
        pytest.skip(f"needs a browser: {INSTALL}")
    return found


def test_a_browser_shows_the_page(browser, tmp_path):
    kept = json.loads((ROOT / "paper_figures" / "data" / "diagnose.json").read_text())
    path = page.save(kept, picture.save(kept, tmp_path / "diagnosis.png"), tmp_path)
    plain = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'own'}")
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"

    def run(*options):
        done = subprocess.run(
            [browser, *plain, offline, *options, path.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = run("--dump-dom")
    # What the browser made of the page: every head is a row, and the picture has been decoded.
    assert shown.count("<tr class=") == len(kept["heads"])
    assert f"<h1>{headline(kept)}</h1>" in shown
    run(f"--screenshot={tmp_path / 'page.png'}", "--window-size=1000,3000")
    assert (tmp_path / "page.png").stat().st_size > 50_000
