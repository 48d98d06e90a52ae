"""`helm test`: ask the model for a few tokens by the cluster's own address, waiting through a cold start.

Runs in a pod of the server's image as `python -c`: standard library only.
Arguments: model name, seconds to wait, then the base URLs to try in turn.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request


def ask(base_url: str, model: str, timeout_s: float) -> dict:
    request = urllib.request.Request(
        f"{base_url}/v1/models/{model}:predict",
        data=json.dumps({"prompt": "What is the meaning of life?", "max_new_tokens": 8}).encode(),
        headers={"Content-Type": "application/json"},
    )
    keys = os.environ.get("API_KEYS", "").split()
    if keys:
        request.add_header("Authorization", f"Api-Key {keys[0]}")
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        return json.load(response)


def main() -> int:
    model, wait_s, *base_urls = sys.argv[1:]
    deadline_s = time.monotonic() + float(wait_s)
    while (left_s := deadline_s - time.monotonic()) > 0:
        for base_url in base_urls:
            try:
                answer = ask(base_url, model, left_s)
            except urllib.error.HTTPError as error:
                body = error.read().decode(errors="replace")
                print(f"{base_url}: {error.code} {body}", flush=True)
                if error.code in (400, 401, 403, 413):  # waiting does not mend these
                    return 1
            except OSError as error:
                print(f"{base_url}: {error}", flush=True)
            else:
                print(json.dumps(answer), flush=True)
                return 0 if answer["predictions"][0]["completion_tokens"] > 0 else 1
        time.sleep(min(5, max(0, deadline_s - time.monotonic())))
    print(f"No answer within {wait_s} s.", flush=True)
    return 1


sys.exit(main())
