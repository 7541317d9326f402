// Reads stdin and prints, as JSON: its SHA-256 (FIPS 180-4, written out), and how often each word occurs in it.
const K = [];
const fraction = (x) => (((x - Math.floor(x)) * 2 ** 32) | 0);
const primes = [];
for (let n = 2; primes.length < 64; n++) if (primes.every((p) => n % p)) primes.push(n);
for (const p of primes) K.push(fraction(Math.cbrt(p)));
const START = primes.slice(0, 8).map((p) => fraction(Math.sqrt(p)));
const rotate = (x, n) => (x >>> n) | (x << (32 - n));

function sha256(bytes) {
    const length = bytes.length;
    const padded = new Uint8Array((((length + 8) >> 6) + 1) * 64);
    padded.set(bytes);
    padded[length] = 0x80;
    const view = new DataView(padded.buffer);
    view.setUint32(padded.length - 4, length * 8);
    let h = START.slice();
    for (let at = 0; at < padded.length; at += 64) {
        const w = [];
        for (let i = 0; i < 64; i++) {
            if (i < 16) {
                w.push(view.getInt32(at + 4 * i));
                continue;
            }
            const a = w[i - 15], b = w[i - 2];
            const s0 = rotate(a, 7) ^ rotate(a, 18) ^ (a >>> 3);
            const s1 = rotate(b, 17) ^ rotate(b, 19) ^ (b >>> 10);
            w.push((w[i - 16] + s0 + w[i - 7] + s1) | 0);
        }
        let [a, b, c, d, e, f, g, k] = h;
        for (let i = 0; i < 64; i++) {
            const one = (k + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & f) ^ (~e & g)) + K[i] + w[i]) | 0;
            const two = ((rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))) | 0;
            [k, g, f, e, d, c, b, a] = [g, f, e, (d + one) | 0, c, b, a, (one + two) | 0];
        }
        h = [a, b, c, d, e, f, g, k].map((x, i) => (x + h[i]) | 0);
    }
    return h.map((x) => (x >>> 0).toString(16).padStart(8, "0")).join("");
}

const text = std.in.readAsString();
const utf8 = [];
for (const letter of text) {
    const c = letter.codePointAt(0);
    if (c < 0x80) utf8.push(c);
    else if (c < 0x800) utf8.push(0xc0 | (c >> 6), 0x80 | (c & 63));
    else if (c < 0x10000) utf8.push(0xe0 | (c >> 12), 0x80 | ((c >> 6) & 63), 0x80 | (c & 63));
    else utf8.push(0xf0 | (c >> 18), 0x80 | ((c >> 12) & 63), 0x80 | ((c >> 6) & 63), 0x80 | (c & 63));
}
const counts = {};
for (const [word] of text.matchAll(/\p{L}+/gu)) counts[word] = (counts[word] || 0) + 1;
console.log(JSON.stringify({ sha256: sha256(Uint8Array.from(utf8)), counts }));
