//! A second inflater (RFC 1951), slow and simple, to check zlib's. It also reports the maximum
//! distance of a back-reference.

/// An inflated message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Inflated {
    pub(crate) out: Vec<u8>,
    /// The maximum distance of a back-reference.
    pub(crate) farthest: usize,
}

/// Inflates the payload of a message. It ends with the first bits of an empty block, whose rest the
/// sender removed. `None` if the payload is invalid.
pub(crate) fn inflate(payload: &[u8]) -> Option<Inflated> {
    let mut bits = Bits { bytes: payload, at: 0 };
    let mut inflated = Inflated { out: Vec::new(), farthest: 0 };
    if payload.is_empty() {
        return Some(inflated);
    }
    loop {
        let is_last = bits.take(1)? == 1;
        match bits.take(2)? {
            0 => {
                bits.align();
                if bits.at == payload.len() * 8 {
                    return Some(inflated);
                }
                let (length, check) = (bits.take(16)?, bits.take(16)?);
                if length != !check & 0xFFFF {
                    return None;
                }
                for _ in 0..length {
                    inflated.out.push(bits.take(8)? as u8);
                }
            }
            1 => inflated.block(&mut bits, &fixed_literals(), &Codes::of(&[5; 30])?)?,
            2 => {
                let (literals, distances) = dynamic(&mut bits)?;
                inflated.block(&mut bits, &literals, &distances)?;
            }
            _ => return None,
        }
        if is_last {
            bits.align();
            if bits.at == payload.len() * 8 {
                return Some(inflated);
            }
        }
    }
}

/// `bytes` as one block of the fixed codes, without back-references, as the payload of a message.
pub(super) fn all_literals(bytes: &[u8]) -> Vec<u8> {
    let (mut out, mut byte, mut count) = (Vec::new(), 0_u8, 0);
    let mut put = |code: u32, length: u32| {
        for i in (0..length).rev() {
            byte |= ((code >> i & 1) as u8) << count;
            count += 1;
            if count == 8 {
                out.push(byte);
                (byte, count) = (0, 0);
            }
        }
    };
    // Not a final block, fixed codes.
    put(0b010, 3);
    for byte in bytes {
        match u32::from(*byte) {
            literal @ 0..144 => put(0x30 + literal, 8),
            literal => put(0x190 + literal - 144, 9),
        }
    }
    // The end of the block, the start of the empty block, and padding.
    put(0, 7 + 3 + 7);
    out
}

struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Bits<'_> {
    fn take(&mut self, count: usize) -> Option<usize> {
        let mut value = 0;
        for i in 0..count {
            let byte = *self.bytes.get(self.at / 8)?;
            value |= usize::from(byte >> (self.at % 8) & 1) << i;
            self.at += 1;
        }
        Some(value)
    }

    fn align(&mut self) {
        self.at = self.at.next_multiple_of(8);
    }
}

/// A set of Huffman codes: the number of codes of each length, and their symbols in order.
struct Codes {
    counts: [usize; 16],
    symbols: Vec<usize>,
}

impl Codes {
    /// `None` if the lengths form no complete set; a single code counts as complete.
    fn of(lengths: &[usize]) -> Option<Self> {
        let mut counts = [0; 16];
        for length in lengths {
            counts[*length] += 1;
        }
        let used = lengths.len() - counts[0];
        counts[0] = 0;
        let mut left = 1_isize;
        for count in &counts[1..] {
            left = left * 2 - *count as isize;
            if left < 0 {
                return None;
            }
        }
        let alone = used <= 1 && counts[1] == used;
        // Only 30 of the 32 fixed distances are used.
        if left > 0 && !alone && lengths != [5; 30] {
            return None;
        }
        let mut symbols = Vec::new();
        for length in 1..16 {
            symbols.extend((0..lengths.len()).filter(|symbol| lengths[*symbol] == length));
        }
        Some(Self { counts, symbols })
    }

    fn symbol(&self, bits: &mut Bits<'_>) -> Option<usize> {
        let (mut code, mut first, mut index) = (0, 0, 0);
        for count in &self.counts[1..] {
            code |= bits.take(1)?;
            if code < first + count {
                return self.symbols.get(index + code - first).copied();
            }
            index += count;
            first = (first + count) * 2;
            code *= 2;
        }
        None
    }
}

fn fixed_literals() -> Codes {
    let lengths: Vec<usize> = (0..288)
        .map(|i| {
            if i < 144 {
                8
            } else if i < 256 {
                9
            } else if i < 280 {
                7
            } else {
                8
            }
        })
        .collect();
    Codes::of(&lengths).unwrap()
}

fn dynamic(bits: &mut Bits<'_>) -> Option<(Codes, Codes)> {
    const ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
    let (literals, distances) = (bits.take(5)? + 257, bits.take(5)? + 1);
    let count = bits.take(4)? + 4;
    if literals > 286 || distances > 30 {
        return None;
    }
    let mut lengths = [0; 19];
    for place in &ORDER[..count] {
        lengths[*place] = bits.take(3)?;
    }
    let codes = Codes::of(&lengths)?;
    let mut lengths = Vec::new();
    while lengths.len() < literals + distances {
        let (value, times) = match codes.symbol(bits)? {
            16 => (*lengths.last()?, 3 + bits.take(2)?),
            17 => (0, 3 + bits.take(3)?),
            18 => (0, 11 + bits.take(7)?),
            length => (length, 1),
        };
        lengths.extend(std::iter::repeat_n(value, times));
    }
    if lengths.len() > literals + distances || lengths[256] == 0 {
        return None;
    }
    Some((Codes::of(&lengths[..literals])?, Codes::of(&lengths[literals..])?))
}

impl Inflated {
    fn block(&mut self, bits: &mut Bits<'_>, literals: &Codes, distances: &Codes) -> Option<()> {
        loop {
            let symbol = literals.symbol(bits)?;
            match symbol {
                0..256 => self.out.push(symbol as u8),
                256 => return Some(()),
                257..286 => {
                    let (base, extra) = length_of(symbol - 257);
                    let length = base + bits.take(extra)?;
                    let symbol = distances.symbol(bits)?;
                    if symbol > 29 {
                        return None;
                    }
                    let extra = (symbol / 2).saturating_sub(1);
                    let base =
                        if symbol < 4 { symbol + 1 } else { ((2 + symbol % 2) << extra) + 1 };
                    let distance = base + bits.take(extra)?;
                    let start = self.out.len().checked_sub(distance)?;
                    self.farthest = self.farthest.max(distance);
                    for i in 0..length {
                        self.out.push(self.out[start + i]);
                    }
                }
                _ => return None,
            }
        }
    }
}

/// The base and the extra bits of a length symbol.
fn length_of(symbol: usize) -> (usize, usize) {
    match symbol {
        0..8 => (symbol + 3, 0),
        28 => (258, 0),
        _ => {
            let extra = symbol / 4 - 1;
            (((4 + symbol % 4) << extra) + 3, extra)
        }
    }
}
