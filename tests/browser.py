"""Open a page in a headless Chromium: run a script in it, at the width of a phone too, in light or dark."""

import html
import json
import re
import shutil
import subprocess

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")

_FRAME = """<!doctype html><meta charset="utf-8"><style>body {{ margin: 0 }}</style>
<iframe id="page" style="border: 0; width: {width}px; height: 4000px" srcdoc="{page}"></iframe>
<pre id="result"></pre>
<script>
document.getElementById("page").addEventListener("load", event => {{
  let found;
  try {{ found = event.target.contentWindow.eval({script}); }} catch (error) {{ found = {{ error: String(error) }}; }}
  document.getElementById("result").textContent = JSON.stringify(found);
}});
</script>"""


@pytest.fixture(scope="session")
def in_browser(tmp_path_factory):
    """A function that runs a script in a page and returns the value of its last expression."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the PATH")
    folder = tmp_path_factory.mktemp("browser")

    def run(page: str, script: str, *, width: int = 1000, dark: bool = False):
        # A frame, because a window of Chromium is at least 500 pixels wide.
        frame = _FRAME.format(width=width, page=html.escape(page), script=json.dumps(script))
        file = folder / "frame.html"
        file.write_text(frame, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
        options += [f"--user-data-dir={folder / 'profile'}", "--window-size=1200,4200"]
        options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        done = subprocess.run(
            [program, *options, "--dump-dom", file.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        (result,) = re.findall(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
        found = json.loads(html.unescape(result))
        assert not (isinstance(found, dict) and "error" in found), found
        return found

    return run
