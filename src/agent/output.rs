//! What one command printed: the bytes of each stream, and the order in which the two took turns, in memory that is
//! bounded by the bytes whatever their order. How many bytes there may be is the sandbox's limit.

use super::Stream;

/// Turns of the two streams that are remembered; of more, neighbours become one.
const MAX_TURNS: usize = 4096;

/// The output of a command; together no longer than the policy's `output_bytes`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    /// Which stream, and how many bytes of it; no two neighbours are of one stream.
    turns: Vec<(Stream, usize)>,
}

impl Output {
    pub fn push(&mut self, stream: Stream, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        match stream {
            Stream::Stdout => self.stdout.extend_from_slice(bytes),
            Stream::Stderr => self.stderr.extend_from_slice(bytes),
        }
        match self.turns.last_mut() {
            Some((last, held)) if *last == stream => *held += bytes.len(),
            _ => {
                if self.turns.len() >= MAX_TURNS {
                    self.halve();
                }
                self.turns.push((stream, bytes.len()));
            }
        }
    }

    /// All of one stream.
    pub fn of(&self, stream: Stream) -> &[u8] {
        match stream {
            Stream::Stdout => &self.stdout,
            Stream::Stderr => &self.stderr,
        }
    }

    /// Both streams in the order of arrival, as far as it is remembered.
    pub fn chunks(&self) -> impl Iterator<Item = (Stream, &[u8])> {
        let (mut stdout, mut stderr) = (0, 0);
        self.turns.iter().map(move |&(stream, bytes)| {
            let from = if stream == Stream::Stdout { &mut stdout } else { &mut stderr };
            let chunk = self.of(stream).get(*from..*from + bytes).unwrap_or_default();
            *from += bytes;
            (stream, chunk)
        })
    }

    /// Makes two turns of each four. Since the streams alternate, and four is even, they go on alternating; the
    /// turn to come is of the stream that the first one is of.
    fn halve(&mut self) {
        let merged = self.turns.chunks(4).flat_map(|four| {
            let bytes = |nth: usize| four.iter().skip(nth).step_by(2).map(|(_, bytes)| bytes).sum::<usize>();
            four.iter()
                .take(2)
                .enumerate()
                .map(|(nth, (stream, _))| (*stream, bytes(nth)))
                .collect::<Vec<_>>()
        });
        self.turns = merged.collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_arrival_is_kept_and_neighbours_of_one_stream_are_one() {
        let mut output = Output::default();
        for (stream, bytes) in [
            (Stream::Stdout, "a"),
            (Stream::Stdout, "b"),
            (Stream::Stderr, "c"),
            (Stream::Stderr, ""),
            (Stream::Stdout, "d"),
        ] {
            output.push(stream, bytes.as_bytes());
        }
        let chunks: Vec<_> = output.chunks().collect();
        let wanted: [(Stream, &[u8]); 3] =
            [(Stream::Stdout, b"ab"), (Stream::Stderr, b"c"), (Stream::Stdout, b"d")];
        assert_eq!(chunks, wanted);
        assert_eq!((output.of(Stream::Stdout), output.of(Stream::Stderr)), (&b"abd"[..], &b"c"[..]));
    }

    #[test]
    fn streams_that_take_turns_byte_by_byte_cost_no_more_than_their_bytes() {
        let mut output = Output::default();
        for n in 0..4_000_000_u32 {
            let stream = if n % 2 == 0 { Stream::Stdout } else { Stream::Stderr };
            output.push(stream, &[u8::try_from(n / 2 % 251).unwrap()]);
            assert!(output.turns.len() <= MAX_TURNS);
        }
        let alternate = output.turns.windows(2).all(|two| two[0].0 != two[1].0);
        assert!(alternate, "neighbours are of two streams after any number of halvings");
        let bytes = std::mem::size_of_val(&output.turns[..]);
        assert!(bytes <= 64 * 1024, "{bytes} bytes to remember the order");
        for stream in [Stream::Stdout, Stream::Stderr] {
            let told: Vec<u8> = output
                .chunks()
                .filter(|(of, _)| *of == stream)
                .flat_map(|(_, bytes)| bytes.to_vec())
                .collect();
            assert_eq!(told, output.of(stream), "no byte is lost or moved within its stream");
            assert_eq!(told.len(), 2_000_000);
        }
    }
}
