"""What more devices and larger meshes would need, from the terms that scaling_devices measured.

    python -m experiments.project_devices experiments/results/scaling_devices.json

    time    a + b N / R + s(R)     a, b: least squares over the rows of one device
    bytes   c + d N / R            c, d: likewise
    s(R)    2 messages a block, of each of which a device receives 4 B M H (D + 1) (R - 1) bytes, at
            BANDWIDTH and LATENCY; and one all-reduce of the gradients, 2 x 4 bytes a parameter

R devices hold N points of one sample. a is what does not shrink: launches and the optimizer.
BANDWIDTH and LATENCY are assumptions about a network between hosts, not measurements; inside a
host the messages are part of what was measured. Extrapolation, not a result.
"""

import argparse
import json
from pathlib import Path

import numpy as np

BANDWIDTH = 25e9  # bytes/s into a device from other hosts
LATENCY = 50e-6  # seconds a message
CASES = ((8, 8_000_000), (8, 100_000_000), (64, 100_000_000), (64, 500_000_000))
BLOCKS, HEAD_WIDTH = 8, 8


def lines(record: dict) -> list[dict]:
    """Fit and projections for each C that was measured at three sizes on one device."""
    found = []
    own = [r for r in record["rows"] if r["part"] == "devices" and "ms" in r]
    for c in sorted({r["C"] for r in own}):
        one = [r for r in own if r["C"] == c and r["devices"] == 1]
        if len(one) < 2:
            continue
        n = np.array([r["N"] for r in one], float)
        fit = lambda name, n=n, one=one: np.polyfit(n, [r[name] for r in one], 1)
        (slope, start), (each, fixed) = fit("ms"), fit("bytes")
        for devices, points in CASES:
            message = 4 * one[0]["M"] * (c // HEAD_WIDTH) * (HEAD_WIDTH + 1) * (devices - 1)
            parameters = BLOCKS * 15 * c * c  # 15 dense layers a block
            gradients = 2 * 4 * parameters
            seconds = (2 * BLOCKS * message + gradients) / BANDWIDTH + (2 * BLOCKS + 1) * LATENCY
            share = points / devices
            found.append(
                {
                    "C": c,
                    "devices": devices,
                    "N": points,
                    "ms": max(start, 0) + slope * share + 1e3 * seconds,
                    "ms_messages": 1e3 * seconds,
                    "GB": (max(fixed, 0) + each * share) / 1e9,
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="what scaling_devices wrote")
    record = json.loads(parser.parse_args().file.read_text())
    print(f"extrapolated from {record['devices']} x {record['device']}, {record['date']}")
    print("| C | devices | points | ms a step | of it messages | GB a device |\n|" + 6 * "---|")
    for r in lines(record):
        print(
            f"| {r['C']} | {r['devices']} | {r['N']:,} | {r['ms']:.0f} | {r['ms_messages']:.1f} "
            f"| {r['GB']:.1f} |"
        )


if __name__ == "__main__":
    main()
