"""verl's reward, asked of `rlaif reward serve`; `rlaif export verl` puts a copy of this file beside the settings.

It needs nothing but Python. The address is in the environment variable ``RLAIF_REWARD_URL``, a key, if the server asks
for one, in ``RLAIF_REWARD_KEY``.
"""

import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

TRIES = 5  # of a server that is not there yet, or has too much to do


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any, **_: Any) -> float:
    """Return the score of a response; verl calls this in threads, one response at a time.

    Args:
        data_source: not read.
        solution_str: the response.
        ground_truth: not read: a reward model needs none.
        extra_info: its `messages` are the prompt's turns, as JSON.

    Raises:
        RuntimeError: the server refuses the request, or cannot be reached.
    """
    turns = [*json.loads(extra_info["messages"]), {"role": "assistant", "content": solution_str}]
    url = os.environ.get("RLAIF_REWARD_URL", "http://127.0.0.1:5000").rstrip("/") + "/classify"
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("RLAIF_REWARD_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps({"input": turns}).encode(), headers)
    for attempt in range(TRIES):
        try:
            with urllib.request.urlopen(request, timeout=180) as answer:
                return float(json.load(answer)["data"][0]["probs"][0])
        except urllib.error.HTTPError as refusal:
            problem = f"{refusal.code} {refusal.read(1000).decode(errors='replace')}"
            if refusal.code != 503:
                break
        except OSError as trouble:
            problem = str(trouble)
        if attempt + 1 < TRIES:
            time.sleep(2**attempt)
    raise RuntimeError(f"{url}: {problem}")
