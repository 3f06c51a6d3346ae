//! The frames that wait for a socket.

use std::{collections::VecDeque, io::IoSlice};

use bytes::Bytes;
use smallvec::SmallVec;

/// The most frames in one vectored write.
const SLICES_MAX: usize = 64;

/// A queue of frames that allocates nothing for a single frame, which is the usual case: in small
/// rooms each delivery is one write.
#[derive(Debug, Default)]
pub(super) struct FrameQueue {
    first: Option<Bytes>,
    /// Empty if there is no first frame.
    others: VecDeque<Bytes>,
    /// The number of unstarted frames that were put ahead of the others.
    ahead: u32,
    /// Whether a part of the first frame is already written.
    is_started: bool,
}

impl FrameQueue {
    pub(super) fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    /// The number of frames.
    pub(super) fn len(&self) -> usize {
        usize::from(self.first.is_some()) + self.others.len()
    }

    pub(super) fn push(&mut self, frame: Bytes) {
        if self.first.is_none() {
            self.first = Some(frame);
        } else {
            self.others.push_back(frame);
        }
    }

    /// Puts a frame ahead of the queue: after the frame that is being written, and after frames put
    /// ahead before.
    pub(super) fn push_ahead(&mut self, frame: Bytes) {
        let index = self.ahead as usize + usize::from(self.is_started);
        self.ahead += 1;
        match index {
            0 => {
                if let Some(first) = self.first.replace(frame) {
                    self.others.push_front(first);
                }
            }
            index => self.others.insert(index - 1, frame),
        }
    }

    /// The number of frames that were put ahead.
    pub(super) fn ahead(&self) -> u32 {
        self.ahead
    }

    /// The only frame, if there is exactly one.
    pub(super) fn only(&self) -> Option<&Bytes> {
        self.first.as_ref().filter(|_| self.others.is_empty())
    }

    /// The next frames for one write, up to `bytes_max`.
    pub(super) fn slices(&self, bytes_max: usize) -> SmallVec<[IoSlice<'_>; SLICES_MAX]> {
        let (mut slices, mut left) = (SmallVec::new(), bytes_max);
        for frame in self.first.iter().chain(&self.others).take(SLICES_MAX) {
            let part = &frame[..frame.len().min(left)];
            slices.push(IoSlice::new(part));
            left -= part.len();
            if left == 0 {
                break;
            }
        }
        slices
    }

    /// Removes the first `written` bytes. Returns the number of completed frames.
    pub(super) fn remove(&mut self, mut written: usize) -> u64 {
        let mut done = 0;
        while let Some(frame) = &mut self.first {
            if written > 0 && !std::mem::replace(&mut self.is_started, true) {
                self.ahead = self.ahead.saturating_sub(1);
            }
            if written < frame.len() {
                // The remainder shares the frame's bytes.
                let _ = frame.split_to(written);
                break;
            }
            written -= frame.len();
            self.first = self.others.pop_front();
            self.is_started = false;
            done += 1;
        }
        if self.others.is_empty() {
            // An idle connection holds no buffer.
            self.others = VecDeque::new();
        }
        done
    }

    /// The next frame.
    pub(super) fn first(&self) -> Option<&Bytes> {
        self.first.as_ref()
    }

    /// Takes the next frame.
    pub(super) fn pop(&mut self) -> Option<Bytes> {
        std::mem::replace(&mut self.first, self.others.pop_front())
    }

    /// Takes all frames.
    pub(super) fn take(&mut self) -> Vec<Bytes> {
        let Self { first, others, .. } = std::mem::take(self);
        first.into_iter().chain(others).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_leave_in_order_and_in_parts() {
        let mut frames = FrameQueue::default();
        for text in ["one", "two", "three"] {
            frames.push(Bytes::from_static(text.as_bytes()));
        }
        assert!(frames.only().is_none());
        assert_eq!(frames.remove(4), 1);
        let left: Vec<_> = frames.slices(usize::MAX).iter().map(|slice| slice.to_vec()).collect();
        assert_eq!(left, [&b"wo"[..], b"three"]);
        for (bytes, expected) in [(1, 1), (2, 2), (4, 4), (100, 7)] {
            let portion = frames.slices(bytes);
            assert_eq!(portion.iter().map(|part| part.len()).sum::<usize>(), expected);
        }
        assert_eq!(frames.remove(2), 1);
        assert_eq!(frames.only().unwrap(), "three");
        assert_eq!((frames.remove(5), frames.is_empty(), frames.others.capacity()), (1, true, 0));
        frames.push(Bytes::from_static(b""));
        frames.push(Bytes::from_static(b"x"));
        assert_eq!(frames.take(), ["", "x"]);
    }

    #[test]
    fn frame_put_ahead_leaves_after_the_started_frame() {
        let text = Bytes::from_static;
        let mut frames = FrameQueue::default();
        frames.push_ahead(text(b"0"));
        assert_eq!((frames.remove(1), frames.ahead(), frames.is_empty()), (1, 0, true));
        frames.push(text(b"bulk1"));
        frames.push(text(b"bulk2"));
        frames.push_ahead(text(b"a"));
        assert_eq!((frames.remove(1), frames.ahead()), (1, 0), "no frame was started");
        assert_eq!(frames.remove(2), 0);
        frames.push_ahead(text(b"bb"));
        frames.push_ahead(text(b"c"));
        frames.push(text(b"bulk3"));
        assert_eq!((frames.remove(4), frames.ahead()), (1, 1), "`bb` is begun");
        frames.push_ahead(text(b"d"));
        assert_eq!(frames.ahead(), 2);
        assert_eq!(frames.take(), ["b", "c", "d", "bulk2", "bulk3"]);
        assert_eq!(frames.ahead(), 0);
    }
}
