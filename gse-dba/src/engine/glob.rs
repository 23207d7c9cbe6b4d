//! Glob patterns of KEYS and SCAN: `*`, `?`, `[a-z]`, `[^x]`, `\` escapes. Iterative, so a pattern of many stars costs at most pattern times text.

/// Whether the whole text fits the pattern.
pub(crate) fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where to go back to: after the last star, and the text it has not yet swallowed.
    let mut star: Option<(usize, usize)> = None;
    loop {
        if p < pattern.len() && pattern[p] == b'*' {
            p += 1;
            star = Some((p, t));
            continue;
        }
        if t == text.len() {
            if p == pattern.len() {
                return true;
            }
            // More text cannot come: an earlier star would only shorten it.
            return false;
        }
        if p < pattern.len()
            && let (true, used) = one(&pattern[p..], text[t])
        {
            p += used;
            t += 1;
            continue;
        }
        match star {
            Some((after, from)) => {
                star = Some((after, from + 1));
                (p, t) = (after, from + 1);
            }
            None => return false,
        }
    }
}

/// Whether the pattern's first element accepts the byte, and how long that element is.
fn one(pattern: &[u8], byte: u8) -> (bool, usize) {
    match pattern[0] {
        b'?' => (true, 1),
        b'\\' if pattern.len() > 1 => (pattern[1] == byte, 2),
        b'[' => class(pattern, byte),
        c => (c == byte, 1),
    }
}

fn class(pattern: &[u8], byte: u8) -> (bool, usize) {
    let mut i = 1;
    let not = pattern.get(1) == Some(&b'^');
    if not {
        i += 1;
    }
    let mut hit = false;
    loop {
        match pattern.get(i) {
            None => break,
            Some(b']') => {
                i += 1;
                break;
            }
            Some(b'\\') if i + 1 < pattern.len() => {
                hit |= pattern[i + 1] == byte;
                i += 2;
            }
            Some(&low) if pattern.get(i + 1) == Some(&b'-') && i + 2 < pattern.len() => {
                let high = pattern[i + 2];
                hit |= (low.min(high)..=low.max(high)).contains(&byte);
                i += 3;
            }
            Some(&c) => {
                hit |= c == byte;
                i += 1;
            }
        }
    }
    (hit != not, i)
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns_mean_what_redis_means_by_them() {
        for (p, t, yes) in [
            ("*", "", true),
            ("a*c", "abbc", true),
            ("a*c", "abbcd", false),
            ("h?llo", "hello", true),
            ("h[a-c]llo", "hbllo", true),
            ("h[^a-c]llo", "hbllo", false),
            ("h\\*llo", "h*llo", true),
            ("h\\*llo", "hxllo", false),
            ("**a", "bba", true),
            ("a", "", false),
            ("", "a", false),
            ("[a", "a", true),
        ] {
            assert_eq!(matches(p.as_bytes(), t.as_bytes()), yes, "{p} {t}");
        }
        let stars = "*a".repeat(40);
        assert!(!matches(stars.as_bytes(), "b".repeat(20_000).as_bytes()));
    }
}
