"""True intervals moved to the sampled frames (`data.snap_truth`).

A boundary between two sampled frames cannot be seen, so an answer that is right to the frame loses
reward by chance. The idea is TimeLens's (arXiv 2512.14698), by a survey: neither the paper's rule
could be read nor does its released code hold one. The rule here: start and end move to the nearest
sampled frame, the earlier of two equally near; an interval whose ends meet keeps its annotated
times. Evaluations and data selection keep the annotated truth.
"""

from dataclasses import replace

import numpy as np

from megatron_vrl.types import EncodedVideo, Interval, VideoSample


def snapped(sample: VideoSample, video: EncodedVideo) -> VideoSample:
    """Return the sample with its true intervals at times of sampled frames."""
    begins_s = sample.window_s[0] if sample.window_s else 0.0
    frames_s = video.timestamps_s - begins_s  # times of a sample count from the start of its window

    def nearest(interval_s: Interval) -> Interval:
        start_s, end_s = (float(frames_s[np.abs(frames_s - t).argmin()]) for t in interval_s)
        return (start_s, end_s) if start_s < end_s else interval_s

    return replace(sample, intervals_s=tuple(map(nearest, sample.intervals_s)))
