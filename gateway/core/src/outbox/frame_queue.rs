//! FrameQueue that wait for a socket.

use std::{collections::VecDeque, io::IoSlice};

use bytes::Bytes;
use smallvec::SmallVec;

/// The most frames in one vectored write.
const SLICES_MAX: usize = 64;

/// A queue of frames that takes no memory of its own for one frame, which is most of them: in small
/// rooms each delivery is one write.
#[derive(Debug, Default)]
pub(super) struct FrameQueue {
    first: Option<Bytes>,
    /// Empty while there is no first one.
    others: VecDeque<Bytes>,
    /// How many of the next whole frames were put ahead of the others.
    ahead: u32,
    /// A part of the first frame is written already.
    is_begun: bool,
}

impl FrameQueue {
    pub(super) fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    pub(super) fn push(&mut self, frame: Bytes) {
        if self.first.is_none() {
            self.first = Some(frame);
        } else {
            self.others.push_back(frame);
        }
    }

    /// Puts a frame ahead of all that waits, behind the frame that is being written and behind those
    /// that were put ahead before.
    pub(super) fn push_ahead(&mut self, frame: Bytes) {
        let place = self.ahead as usize + usize::from(self.is_begun);
        self.ahead += 1;
        match place {
            0 => {
                if let Some(first) = self.first.replace(frame) {
                    self.others.push_front(first);
                }
            }
            place => self.others.insert(place - 1, frame),
        }
    }

    /// How many frames wait that were put ahead of others.
    pub(super) fn ahead(&self) -> u32 {
        self.ahead
    }

    /// The only frame, if there is one.
    pub(super) fn only(&self) -> Option<&Bytes> {
        self.first.as_ref().filter(|_| self.others.is_empty())
    }

    /// The next frames for one write, as far as `bytes_max` reaches.
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

    /// Forgets the first `written` bytes. Returns how many frames are done with.
    pub(super) fn remove(&mut self, mut written: usize) -> u64 {
        let mut done = 0;
        while let Some(frame) = &mut self.first {
            if written > 0 && !std::mem::replace(&mut self.is_begun, true) {
                self.ahead = self.ahead.saturating_sub(1);
            }
            if written < frame.len() {
                // The rest of a frame is again shared bytes.
                let _ = frame.split_to(written);
                break;
            }
            written -= frame.len();
            self.first = self.others.pop_front();
            self.is_begun = false;
            done += 1;
        }
        if self.others.is_empty() {
            // An idle connection holds no buffer.
            self.others = VecDeque::new();
        }
        done
    }

    /// The next frame, to be taken.
    pub(super) fn first(&self) -> Option<&Bytes> {
        self.first.as_ref()
    }

    /// Takes the next frame.
    pub(super) fn pop(&mut self) -> Option<Bytes> {
        std::mem::replace(&mut self.first, self.others.pop_front())
    }

    /// Takes all of them.
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
    fn a_frame_put_ahead_leaves_at_the_next_border_of_a_frame() {
        let text = Bytes::from_static;
        let mut frames = FrameQueue::default();
        frames.push_ahead(text(b"0"));
        assert_eq!((frames.remove(1), frames.ahead(), frames.is_empty()), (1, 0, true));
        frames.push(text(b"bulk1"));
        frames.push(text(b"bulk2"));
        frames.push_ahead(text(b"a"));
        assert_eq!((frames.remove(1), frames.ahead()), (1, 0), "nothing was begun");
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
