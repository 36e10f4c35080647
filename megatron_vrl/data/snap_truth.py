"""True intervals moved to the times of temporal steps (`data.snap_truth`).

A boundary inside a temporal step cannot be seen, so an answer that is right to the step loses
reward by chance. The rule is that of TimeLens's released training (arXiv 2512.14698,
`_align_spans_to_sampled_timestamps` in training/data/grounding.py of the branch `train`): the time
of a step is that of its first frame; the start moves to the last such time that is not later, the
end to the first that is not earlier. An end after the last time becomes the last time. One case
differs: an interval whose ends would meet keeps its annotated times, since it could not be scored.
Evaluations and data selection keep the annotated truth.
"""

from dataclasses import replace

import numpy as np

from megatron_vrl.types import EncodedVideo, Interval, Sample


def snapped(sample: Sample, video: EncodedVideo) -> Sample:
    """Return the sample with its true intervals at times of temporal steps."""
    begins_s = sample.window_s[0] if sample.window_s else 0.0
    steps_s = video.timestamps_s[::2] - begins_s  # times of a sample count from its window's start
    last = len(steps_s) - 1

    def outwards(interval_s: Interval) -> Interval:
        first = max(0, int(np.searchsorted(steps_s, interval_s[0], side="right")) - 1)
        end = min(last, max(first, int(np.searchsorted(steps_s, interval_s[1], side="left"))))
        start_s, end_s = float(steps_s[first]), float(steps_s[end])
        return (start_s, end_s) if start_s < end_s else interval_s

    return replace(sample, intervals_s=tuple(map(outwards, sample.intervals_s)))
