//! SHA-256 (FIPS 180-4).

#[rustfmt::skip]
const K: [u32; 64] = [
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
];
#[rustfmt::skip]
const START: [u32; 8] = [
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
];

fn sum(terms: &[u32]) -> u32 {
    terms.iter().fold(0, |sum, term| sum.wrapping_add(*term))
}

fn mix(x: u32, a: u32, b: u32, c: u32) -> u32 {
    x.rotate_right(a) ^ x.rotate_right(b) ^ x.rotate_right(c)
}

fn block(h: &mut [u32; 8], bytes: &[u8]) {
    let mut w = [0u32; 64];
    for (i, byte) in bytes.iter().enumerate() {
        w[i / 4] = w[i / 4] << 8 | u32::from(*byte);
    }
    let mut v = *h;
    for i in 0..64 {
        if i >= 16 {
            let (a, b) = (w[i - 15], w[i - 2]);
            let low = a.rotate_right(7) ^ a.rotate_right(18) ^ (a >> 3);
            let high = b.rotate_right(17) ^ b.rotate_right(19) ^ (b >> 10);
            w[i] = sum(&[w[i - 16], low, w[i - 7], high]);
        }
        let one = sum(&[v[7], mix(v[4], 6, 11, 25), (v[4] & v[5]) ^ (!v[4] & v[6]), K[i], w[i]]);
        let two = sum(&[mix(v[0], 2, 13, 22), (v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2])]);
        v.rotate_right(1);
        v[4] = sum(&[v[4], one]);
        v[0] = sum(&[one, two]);
    }
    h.iter_mut().zip(v).for_each(|(old, new)| *old = old.wrapping_add(new));
}

/// The digest of `bytes` as 64 lower-case hexadecimal digits.
pub fn sha256(bytes: &[u8]) -> String {
    let mut h = START;
    let whole = bytes.chunks_exact(64);
    let mut tail = whole.remainder().to_vec();
    tail.push(0x80);
    tail.resize(if tail.len() > 56 { 120 } else { 56 }, 0);
    tail.extend((bytes.len() as u64 * 8).to_be_bytes());
    whole.chain(tail.chunks_exact(64)).for_each(|part| block(&mut h, part));
    h.iter().map(|word| format!("{word:08x}")).collect()
}
