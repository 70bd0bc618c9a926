//! The base 85 of git's binary patches, lines with their length included. Pure.

const DIGITS: &[u8; 85] =
    b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~";
/// Bytes on one line.
const LINE: usize = 52;

/// Appends the lines of `data`.
pub(super) fn write(out: &mut Vec<u8>, data: &[u8]) {
    for line in data.chunks(LINE) {
        let n = line.len() as u8;
        out.push(if n <= 26 { b'A' + n - 1 } else { b'a' + n - 27 });
        for group in line.chunks(4) {
            let mut four = [0u8; 4];
            for (to, from) in four.iter_mut().zip(group) {
                *to = *from;
            }
            let mut value = u32::from_be_bytes(four);
            let mut five = [0u8; 5];
            for digit in five.iter_mut().rev() {
                *digit = DIGITS.get((value % 85) as usize).copied().unwrap_or(b'0');
                value /= 85;
            }
            out.extend_from_slice(&five);
        }
        out.push(b'\n');
    }
}

/// Appends what one line holds; `None` if it is malformed.
pub(super) fn read_line(line: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let (length, digits) = line.split_first()?;
    let length = match length {
        b'A'..=b'Z' => usize::from(length - b'A') + 1,
        b'a'..=b'z' => usize::from(length - b'a') + 27,
        _ => return None,
    };
    if digits.len() != length.div_ceil(4) * 5 {
        return None;
    }
    let mut bytes = Vec::with_capacity(56);
    for five in digits.chunks(5) {
        let mut value = 0u64;
        for digit in five {
            value = value * 85 + DIGITS.iter().position(|d| d == digit)? as u64;
        }
        bytes.extend_from_slice(&u32::try_from(value).ok()?.to_be_bytes());
    }
    out.extend_from_slice(bytes.get(..length)?);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_comes_back() {
        for n in 0..200usize {
            let data: Vec<u8> = (0..n).map(|i| (i * 37 % 256) as u8).collect();
            let (mut text, mut back) = (Vec::new(), Vec::new());
            write(&mut text, &data);
            for line in text.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
                read_line(line, &mut back).unwrap();
            }
            assert_eq!(back, data);
        }
    }

    #[test]
    fn malformed_lines_are_refused() {
        for line in [&b""[..], b"A", b"A0000", b"A~~~~~", b"0abcde", b"A\x80\x80\x80\x80\x80", b"z00000"] {
            assert_eq!(read_line(line, &mut Vec::new()), None, "{line:?}");
        }
    }
}
