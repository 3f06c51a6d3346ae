//! Frames that wait for a socket.

use std::{collections::VecDeque, io::IoSlice};

use bytes::Bytes;
use smallvec::SmallVec;

/// The most frames in one vectored write.
const SLICES_MAX: usize = 64;

/// A queue of frames that takes no memory of its own for one frame, which is most of them: in small
/// rooms each delivery is one write.
#[derive(Debug, Default)]
pub(super) struct Frames {
    first: Option<Bytes>,
    /// Empty while there is no first one.
    others: VecDeque<Bytes>,
}

impl Frames {
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

    /// The only frame, if there is one.
    pub(super) fn only(&self) -> Option<&Bytes> {
        self.first.as_ref().filter(|_| self.others.is_empty())
    }

    /// The next frames, for one write.
    pub(super) fn slices(&self) -> SmallVec<[IoSlice<'_>; SLICES_MAX]> {
        let frames = self.first.iter().chain(&self.others);
        frames.take(SLICES_MAX).map(|frame| IoSlice::new(frame)).collect()
    }

    /// Forgets the first `written` bytes. Returns how many frames are done with.
    pub(super) fn remove(&mut self, mut written: usize) -> u64 {
        let mut done = 0;
        while let Some(frame) = &mut self.first {
            if written < frame.len() {
                // The rest of a frame is again shared bytes.
                let _ = frame.split_to(written);
                break;
            }
            written -= frame.len();
            self.first = self.others.pop_front();
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
        let Self { first, others } = std::mem::take(self);
        first.into_iter().chain(others).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_leave_in_order_and_in_parts() {
        let mut frames = Frames::default();
        for text in ["one", "two", "three"] {
            frames.push(Bytes::from_static(text.as_bytes()));
        }
        assert!(frames.only().is_none());
        assert_eq!(frames.remove(4), 1);
        let left: Vec<_> = frames.slices().iter().map(|slice| slice.to_vec()).collect();
        assert_eq!(left, [&b"wo"[..], b"three"]);
        assert_eq!(frames.remove(2), 1);
        assert_eq!(frames.only().unwrap(), "three");
        assert_eq!((frames.remove(5), frames.is_empty(), frames.others.capacity()), (1, true, 0));
        frames.push(Bytes::from_static(b""));
        frames.push(Bytes::from_static(b"x"));
        assert_eq!(frames.take(), ["", "x"]);
    }
}
