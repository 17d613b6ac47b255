package oip

import (
	"math"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"
	"unsafe"
)

// maxDepth bounds the nesting of values that the decoder does not know and skips.
const maxDepth = 64

// scanner is a cursor over one JSON text. The first fault sticks: from then on every method returns at once with a zero
// value, so callers check err only where they would otherwise loop or allocate.
type scanner struct {
	b   []byte
	i   int
	err error
}

func (s *scanner) fail(format string, args ...any) {
	if s.err == nil {
		s.err = badf(format, args...)
	}
}

// wrong reports what stands at the cursor in place of what is expected.
func (s *scanner) wrong(expected string) {
	s.fail("expected %s, got %s at byte %d", expected, s.token(), s.i)
}

// token is a short piece of the text at the cursor, for messages.
func (s *scanner) token() string {
	if s.i >= len(s.b) {
		return "the end of the JSON"
	}
	end := s.i + 1
	for end < len(s.b) && end < s.i+24 && !isDelimiter(s.b[end]) && !isDelimiter(s.b[s.i]) {
		end++
	}
	return strconv.Quote(string(s.b[s.i:end]))
}

func isDelimiter(c byte) bool {
	switch c {
	case ',', ':', '[', ']', '{', '}', ' ', '\t', '\r', '\n':
		return true
	}
	return false
}

// peek skips white space and gives the next byte, 0 at the end.
func (s *scanner) peek() byte {
	for s.i < len(s.b) {
		switch c := s.b[s.i]; c {
		case ' ', '\t', '\r', '\n':
			s.i++
		default:
			return c
		}
	}
	return 0
}

// take consumes the given byte, or fails.
func (s *scanner) take(c byte, expected string) bool {
	if s.err != nil {
		return false
	}
	if s.peek() != c {
		s.wrong(expected)
		return false
	}
	s.i++
	return true
}

// more consumes the comma or the closing byte after an element, and says whether another element follows.
func (s *scanner) more(closing byte) bool {
	if s.err != nil {
		return false
	}
	switch s.peek() {
	case ',':
		s.i++
		return true
	case closing:
		s.i++
		return false
	}
	s.wrong(`"," or "` + string(rune(closing)) + `"`)
	return false
}

// object calls member for each member; member must consume the value. The key is valid only during the call.
func (s *scanner) object(what string, member func(key []byte)) {
	if !s.take('{', what+", a JSON object") {
		return
	}
	if s.peek() == '}' {
		s.i++
		return
	}
	for {
		key := s.text("a member's name")
		if !s.take(':', `":"`) {
			return
		}
		member(key)
		if !s.more('}') {
			return
		}
	}
}

// array calls element for each element; element must consume it.
func (s *scanner) array(what string, element func(i int)) {
	if !s.take('[', what+", a JSON array") {
		return
	}
	if s.peek() == ']' {
		s.i++
		return
	}
	for i := 0; ; i++ {
		element(i)
		if !s.more(']') {
			return
		}
	}
}

// text consumes a string and gives its bytes, which alias the input unless the string has escapes.
func (s *scanner) text(what string) []byte {
	if !s.take('"', what+", a string") {
		return nil
	}
	start := s.i
	for s.i < len(s.b) {
		c := s.b[s.i]
		switch {
		case c == '"':
			out := s.b[start:s.i]
			if !utf8.Valid(out) {
				s.i = start
				s.fail("the string at byte %d is not UTF-8", start)
				return nil
			}
			s.i++
			return out
		case c == '\\':
			return s.escaped(start)
		case c < ' ':
			s.fail("a control character in the string at byte %d", start)
			return nil
		}
		s.i++
	}
	s.fail("the string at byte %d has no end", start)
	return nil
}

// escaped goes on with a string that has escapes, from the first of them.
func (s *scanner) escaped(start int) []byte {
	out := append([]byte(nil), s.b[start:s.i]...)
	for s.i < len(s.b) {
		c := s.b[s.i]
		s.i++
		switch {
		case c == '"':
			if !utf8.Valid(out) {
				s.fail("the string at byte %d is not UTF-8", start)
				return nil
			}
			return out
		case c == '\\':
			out = s.escape(out)
			if s.err != nil {
				return nil
			}
		case c < ' ':
			s.fail("a control character in the string at byte %d", start)
			return nil
		default:
			out = append(out, c)
		}
	}
	s.fail("the string at byte %d has no end", start)
	return nil
}

var escapes = [256]byte{'"': '"', '\\': '\\', '/': '/', 'b': '\b', 'f': '\f', 'n': '\n', 'r': '\r', 't': '\t'}

// escape appends what the escape after a backslash stands for.
func (s *scanner) escape(out []byte) []byte {
	if s.i >= len(s.b) {
		s.fail("the JSON ends inside an escape")
		return out
	}
	c := s.b[s.i]
	s.i++
	if c != 'u' {
		if escapes[c] == 0 {
			s.fail("unknown escape %q at byte %d", `\`+string(rune(c)), s.i-1)
		}
		return append(out, escapes[c])
	}
	r := s.hex4()
	if utf16.IsSurrogate(r) {
		low := rune(-1)
		if s.i+1 < len(s.b) && s.b[s.i] == '\\' && s.b[s.i+1] == 'u' {
			s.i += 2
			low = s.hex4()
		}
		if r = utf16.DecodeRune(r, low); r == utf8.RuneError {
			s.fail("half of a surrogate pair at byte %d", s.i)
		}
	}
	return utf8.AppendRune(out, r)
}

func (s *scanner) hex4() rune {
	if s.i+4 > len(s.b) {
		s.fail("the JSON ends inside an escape")
		return 0
	}
	n, err := strconv.ParseUint(string(s.b[s.i:s.i+4]), 16, 16)
	if err != nil {
		s.fail("a \\u escape needs four hexadecimal digits, got %q", s.b[s.i:s.i+4])
	}
	s.i += 4
	return rune(n)
}

// name consumes a string of at most MaxName bytes and copies it.
func (s *scanner) name(what string) string {
	b := s.text(what)
	if len(b) > MaxName {
		s.fail("%s has at most %d bytes, got %d", what, MaxName, len(b))
	}
	return string(b)
}

func (s *scanner) literal(word string) bool {
	if len(s.b)-s.i >= len(word) && string(s.b[s.i:s.i+len(word)]) == word {
		s.i += len(word)
		return true
	}
	return false
}

func (s *scanner) boolean() bool {
	if s.err != nil {
		return false
	}
	s.peek()
	if s.literal("true") {
		return true
	}
	if !s.literal("false") {
		s.wrong("true or false")
	}
	return false
}

// number is a JSON number as it was scanned: ±mantissa·10^exp when exact, otherwise only its text is right.
type number struct {
	mantissa uint64
	exp      int
	negative bool
	integer  bool // no fraction and no exponent
	exact    bool // mantissa holds every digit
	text     []byte
}

// number consumes a number after white space.
func (s *scanner) number() (n number) {
	if s.err != nil {
		return n
	}
	s.peek()
	b, i, start := s.b, s.i, s.i
	n.exact, n.integer = true, true
	if i < len(b) && b[i] == '-' {
		n.negative = true
		i++
	}
	digits := i
	for i < len(b) && b[i]-'0' <= 9 {
		n.mantissa = n.mantissa*10 + uint64(b[i]-'0')
		i++
	}
	count := i - digits
	if count == 0 || count > 1 && b[digits] == '0' {
		s.wrong("a number")
		return n
	}
	if i < len(b) && b[i] == '.' {
		i++
		n.integer = false
		fraction := i
		for i < len(b) && b[i]-'0' <= 9 {
			n.mantissa = n.mantissa*10 + uint64(b[i]-'0')
			i++
		}
		n.exp = fraction - i
		count += i - fraction
		if i == fraction {
			s.wrong("a number")
			return n
		}
	}
	if i < len(b) && b[i]|' ' == 'e' {
		i++
		n.integer = false
		sign := 1
		if i < len(b) && (b[i] == '+' || b[i] == '-') {
			if b[i] == '-' {
				sign = -1
			}
			i++
		}
		exp, first := 0, i
		for i < len(b) && b[i]-'0' <= 9 {
			if exp < 1e5 {
				exp = exp*10 + int(b[i]-'0')
			}
			i++
		}
		if i == first {
			s.wrong("a number")
			return n
		}
		n.exp += sign * exp
	}
	n.exact = count <= 19 // 19 digits always fit 64 bits
	n.text = b[start:i]
	s.i = i
	return n
}

var powers = [...]float64{
	1, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22,
}

// float64 is the nearest FP64; ok is false when the number is too large for one.
func (n *number) float64() (f float64, ok bool) {
	// Both operands are exact, so the one rounding of the operation is the right one.
	if n.exact && n.mantissa <= 1<<53 && -22 <= n.exp && n.exp <= 22 {
		f = float64(n.mantissa)
		if n.exp < 0 {
			f /= powers[-n.exp]
		} else {
			f *= powers[n.exp]
		}
		if n.negative {
			f = -f
		}
		return f, true
	}
	f, err := strconv.ParseFloat(unsafe.String(unsafe.SliceData(n.text), len(n.text)), 64)
	return f, err == nil
}

// float32 is the nearest FP32. Rounding by way of FP64 is right unless that FP64 lies half-way between two FP32 or is
// too small for a normal one.
func (n *number) float32() (f float32, ok bool) {
	wide, ok := n.float64()
	const halfway, below = 1 << 28, 1<<29 - 1
	abs := math.Abs(wide)
	if ok && (math.Float64bits(wide)&below != halfway && abs >= 0x1p-126 || abs == 0 && n.mantissa == 0 && n.exact) {
		f = float32(wide)
		return f, !math.IsInf(float64(f), 0)
	}
	wide, err := strconv.ParseFloat(unsafe.String(unsafe.SliceData(n.text), len(n.text)), 32)
	return float32(wide), err == nil
}

// signed is the number as a signed integer of the given bits.
func (n *number) signed(bits int) (int64, bool) {
	limit := uint64(1) << (bits - 1)
	if !n.integer || !n.fits64() || n.mantissa > limit || n.mantissa == limit && !n.negative {
		return 0, false
	}
	if n.negative {
		return -int64(n.mantissa), true
	}
	return int64(n.mantissa), true
}

// unsigned is the number as an unsigned integer of the given bits.
func (n *number) unsigned(bits int) (uint64, bool) {
	if !n.integer || !n.fits64() || n.negative && n.mantissa != 0 || bits < 64 && n.mantissa>>bits != 0 {
		return 0, false
	}
	return n.mantissa, true
}

// fits64 says whether the mantissa of an integer did not overflow.
func (n *number) fits64() bool {
	if n.exact {
		return true
	}
	digits := n.text
	if n.negative {
		digits = digits[1:]
	}
	_, err := strconv.ParseUint(string(digits), 10, 64)
	return err == nil
}

// skip consumes any value and checks that it is JSON.
func (s *scanner) skip(depth int) {
	if s.err != nil {
		return
	}
	if depth > maxDepth {
		s.fail("JSON nested deeper than %d", maxDepth)
		return
	}
	switch c := s.peek(); {
	case c == '{':
		s.object("a value", func([]byte) { s.skip(depth + 1) })
	case c == '[':
		s.array("a value", func(int) { s.skip(depth + 1) })
	case c == '"':
		s.text("a value")
	case c == '-' || c-'0' <= 9:
		s.number()
	case !s.literal("true") && !s.literal("false") && !s.literal("null"):
		s.wrong("a JSON value")
	}
}

// end checks that nothing but white space is left.
func (s *scanner) end() {
	if s.err == nil && s.peek() != 0 || s.err == nil && s.i < len(s.b) {
		s.wrong("the end of the JSON")
	}
}

// scalar consumes a parameter: a string, a number or a boolean.
func (s *scanner) scalar() any {
	switch c := s.peek(); {
	case s.err != nil:
		return nil
	case c == '"':
		return string(s.text("a parameter"))
	case c == '-' || c-'0' <= 9:
		n := s.number()
		if v, ok := n.signed(64); ok {
			return v
		}
		f, ok := n.float64()
		if !ok {
			s.fail("the number %s does not fit FP64", clip(string(n.text), 32))
		}
		return f
	case c == 't' || c == 'f':
		return s.boolean()
	}
	s.wrong("a string, a number or a boolean")
	return nil
}
