package cluster

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
)

// The msgpack that records and commands are stored as: https://github.com/msgpack/msgpack/blob/master/spec.md.
// The append functions choose the same form for a value as go-msgpack does with its canonical option.

func appendStr(b []byte, s string) []byte {
	switch n := len(s); {
	case n < 32:
		b = append(b, 0xa0|byte(n))
	case n < 1<<8:
		b = append(b, 0xd9, byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, 0xda), uint16(n))
	default:
		b = binary.BigEndian.AppendUint32(append(b, 0xdb), uint32(n))
	}
	return append(b, s...)
}

// appendBin keeps nil and empty apart.
func appendBin(b, bin []byte) []byte {
	if bin == nil {
		return append(b, 0xc0)
	}
	return appendBytes(b, bin)
}

func appendBytes[T []byte | string](b []byte, s T) []byte {
	switch n := len(s); {
	case n < 1<<8:
		b = append(b, 0xc4, byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, 0xc5), uint16(n))
	default:
		b = binary.BigEndian.AppendUint32(append(b, 0xc6), uint32(n))
	}
	return append(b, s...)
}

// storeMap begins a map of at most n pairs at the given place; storeMapEnd fills in how many there are.
func storeMap(b []byte, n int) (_ []byte, at, pairs int) {
	if n < 16 {
		return append(b, 0x80), len(b), 0
	}
	return append(b, 0xde, 0, 0), len(b), 0
}

func storeMapEnd(b []byte, at, pairs int) []byte {
	if b[at] == 0x80 {
		b[at] |= byte(pairs)
	} else {
		binary.BigEndian.PutUint16(b[at+1:], uint16(pairs))
	}
	return b
}

func appendBool(b []byte, v bool) []byte {
	if v {
		return append(b, 0xc3)
	}
	return append(b, 0xc2)
}

func appendInt(b []byte, v int64) []byte {
	switch {
	case v >= -32 && v <= math.MaxInt8:
		return append(b, byte(v))
	case v >= math.MinInt8 && v < 0:
		return append(b, 0xd0, byte(v))
	case v >= math.MinInt16 && v <= math.MaxInt16:
		return binary.BigEndian.AppendUint16(append(b, 0xd1), uint16(v))
	case v >= math.MinInt32 && v <= math.MaxInt32:
		return binary.BigEndian.AppendUint32(append(b, 0xd2), uint32(v))
	}
	return binary.BigEndian.AppendUint64(append(b, 0xd3), uint64(v))
}

func appendUint(b []byte, v uint64) []byte {
	switch {
	case v <= math.MaxInt8:
		return append(b, byte(v))
	case v <= math.MaxUint8:
		return append(b, 0xcc, byte(v))
	case v <= math.MaxUint16:
		return binary.BigEndian.AppendUint16(append(b, 0xcd), uint16(v))
	case v <= math.MaxUint32:
		return binary.BigEndian.AppendUint32(append(b, 0xce), uint32(v))
	}
	return binary.BigEndian.AppendUint64(append(b, 0xcf), v)
}

func appendLen(b []byte, fix, b16 byte, n int) []byte {
	switch {
	case n < 16:
		return append(b, fix|byte(n))
	case n < 1<<16:
		return binary.BigEndian.AppendUint16(append(b, b16), uint16(n))
	}
	return binary.BigEndian.AppendUint32(append(b, b16+1), uint32(n))
}

func appendMapLen(b []byte, n int) []byte { return appendLen(b, 0x80, 0xde, n) }

func appendPtr[T any](b []byte, v *T, f func([]byte, T) []byte) []byte {
	if v == nil {
		return append(b, 0xc0)
	}
	return f(b, *v)
}

func appendList[E any](b []byte, list []E, f func([]byte, E) []byte) []byte {
	if list == nil {
		return append(b, 0xc0)
	}
	b = appendLen(b, 0x90, 0xdc, len(list))
	for _, e := range list {
		b = f(b, e)
	}
	return b
}

func appendMap[V any](b []byte, m map[string]V, f func([]byte, V) []byte) []byte {
	if m == nil {
		return append(b, 0xc0)
	}
	b = appendMapLen(b, len(m))
	if len(m) == 1 {
		for k, v := range m {
			b = f(appendStr(b, k), v)
		}
		return b
	}
	var few [16]string
	keys := few[:0]
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		b = f(appendStr(b, k), m[k])
	}
	return b
}

// decoder reads msgpack. The first fault is kept, from then on it reads nothing.
// It never allocates more than the bytes that are there can fill.
type decoder struct {
	left   []byte
	err    error
	shared *interner // nil: strings are not shared
	short  bool      // the record may have packed fields; elsewhere they are unknown
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf(format, args...)
	}
	d.left = nil
}

// take gives the next n bytes, nil when they are not there.
func (d *decoder) take(n int) []byte {
	if n > len(d.left) {
		d.fail("record ends within a value")
		return nil
	}
	b := d.left[:n:n]
	d.left = d.left[n:]
	return b
}

// number reads an unsigned integer of 1, 2, 4 or 8 bytes.
func (d *decoder) number(n int) uint64 {
	b := d.take(n)
	switch len(b) {
	case 1:
		return uint64(b[0])
	case 2:
		return uint64(binary.BigEndian.Uint16(b))
	case 4:
		return uint64(binary.BigEndian.Uint32(b))
	case 8:
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

// head reads a value's first byte; 0xc1, which msgpack never uses, after a fault.
func (d *decoder) head() byte {
	if len(d.left) == 0 {
		d.fail("record ends where a value should begin")
		return 0xc1
	}
	c := d.left[0]
	d.left = d.left[1:]
	return c
}

// null takes the next value if it is nil.
func (d *decoder) null() bool {
	if len(d.left) == 0 || d.left[0] != 0xc0 {
		return false
	}
	d.left = d.left[1:]
	return true
}

// elements bounds what a container says it holds: each takes one byte or more.
func (d *decoder) elements(n uint64) int {
	if n > uint64(len(d.left)) {
		d.fail("record ends within a list or map of %d", n)
		return 0
	}
	return int(n)
}

// mapLen reads the number of a map's pairs; 0 for nil.
func (d *decoder) mapLen() int {
	switch c := d.head(); {
	case c&0xf0 == 0x80:
		return d.elements(uint64(c & 0x0f))
	case c == 0xde:
		return d.elements(d.number(2))
	case c == 0xdf:
		return d.elements(d.number(4))
	case c != 0xc0:
		d.fail("found byte %#x, not a map", c)
	}
	return 0
}

func (d *decoder) listLen() int {
	switch c := d.head(); {
	case c&0xf0 == 0x90:
		return d.elements(uint64(c & 0x0f))
	case c == 0xdc:
		return d.elements(d.number(2))
	case c == 0xdd:
		return d.elements(d.number(4))
	case c != 0xc0:
		d.fail("found byte %#x, not a list", c)
	}
	return 0
}

// key reads a string or bytes without a copy.
func (d *decoder) key() []byte {
	switch c := d.head(); {
	case c&0xe0 == 0xa0:
		return d.take(int(c & 0x1f))
	case c == 0xd9 || c == 0xc4:
		return d.take(int(d.number(1)))
	case c == 0xda || c == 0xc5:
		return d.take(int(d.number(2)))
	case c == 0xdb || c == 0xc6:
		return d.take(int(d.number(4)))
	case c != 0xc0:
		d.fail("found byte %#x, not a string", c)
	}
	return nil
}

// field reads a struct's key and gives its place among the known ones, which are sorted; -1 for another. Stored keys are
// sorted, too: mostly it is the next one.
func (d *decoder) field(keys []string, next *int) int {
	if i := *next; i < len(keys) {
		if k := keys[i]; len(d.left) > len(k) && d.left[0] == 0xa0|byte(len(k)) && string(d.left[1:1+len(k)]) == k {
			d.left = d.left[1+len(k):]
			*next = i + 1
			return i
		}
	}
	i, ok := slices.BinarySearch(keys, string(d.key()))
	if !ok {
		return -1
	}
	*next = i + 1
	return i
}

// text reads a string that is met once.
func (d *decoder) text() string { return string(d.key()) }

// str reads a string that may be met again.
func (d *decoder) str() string {
	b := d.key()
	if d.shared != nil {
		return d.shared.str(b)
	}
	return string(b)
}

func (d *decoder) bin() []byte {
	if d.null() {
		return nil
	}
	return append([]byte{}, d.key()...)
}

// packed reads a packed field and looks that it can be unpacked.
func (d *decoder) packed(s *shape) string {
	if !d.short {
		d.skip()
		return ""
	}
	text := d.text()
	u, strings := unpacker{left: text}, uint64(0)
	if u.walk(s, &strings); u.bad || u.left != "" {
		d.fail("packed field is damaged, or a newer version wrote it")
	}
	return text
}

func (d *decoder) bool() bool {
	switch c := d.head(); c {
	case 0xc3, 0x01:
		return true
	case 0xc2, 0x00, 0xc0:
	default:
		d.fail("found byte %#x, not true or false", c)
	}
	return false
}

// integer reads an integer of either kind: its bits, and whether it is below zero.
func (d *decoder) integer() (v uint64, negative bool) {
	if len(d.left) > 0 && d.left[0] < 0x80 {
		v = uint64(d.left[0])
		d.left = d.left[1:]
		return v, false
	}
	switch c := d.head(); {
	case c >= 0xe0:
		return uint64(int8(c)), true
	case c >= 0xcc && c <= 0xcf:
		return d.number(1 << (c - 0xcc)), false
	case c >= 0xd0 && c <= 0xd3:
		size := 1 << (c - 0xd0)
		shift := 64 - 8*size
		s := int64(d.number(size)<<shift) >> shift
		return uint64(s), s < 0
	case c != 0xc0:
		d.fail("found byte %#x, not a number", c)
	}
	return 0, false
}

func (d *decoder) int() int64 {
	v, _ := d.integer()
	return int64(v)
}

func (d *decoder) uint() uint64 {
	v, negative := d.integer()
	if negative {
		d.fail("found %d where no negative number can be", int64(v))
		return 0
	}
	return v
}

func (d *decoder) uint16() uint16 {
	v := d.uint()
	if v > math.MaxUint16 {
		d.fail("%d is over 65535", v)
		return 0
	}
	return uint16(v)
}

// maxSkipDepth bounds the containers within containers of an unknown field.
const maxSkipDepth = 100

// skip passes over a value of any kind.
func (d *decoder) skip() { d.skipTo(maxSkipDepth) }

func (d *decoder) skipTo(depth int) {
	if depth == 0 {
		d.fail("an unknown field is more than %d containers deep", maxSkipDepth)
	}
	if len(d.left) == 0 {
		d.head()
		return
	}
	n := 0
	switch c := d.left[0]; {
	case c < 0x80 || c >= 0xe0 || c == 0xc0 || c == 0xc2 || c == 0xc3:
		d.head()
	case c&0xf0 == 0x80 || c == 0xde || c == 0xdf:
		n = 2 * d.mapLen()
	case c&0xf0 == 0x90 || c == 0xdc || c == 0xdd:
		n = d.listLen()
	case c >= 0xc7 && c <= 0xc9: // extension: length, type, bytes
		d.head()
		size := d.number(1 << (c - 0xc7))
		d.head()
		d.take(d.elements(size))
	case c >= 0xd4 && c <= 0xd8:
		d.head()
		d.take(1 + 1<<(c-0xd4))
	case c == 0xca || c == 0xcb: // floats
		d.head()
		d.take(4 << (c - 0xca))
	case c >= 0xcc && c <= 0xd3:
		d.integer()
	default:
		d.key()
	}
	for ; n > 0 && d.err == nil; n-- {
		d.skipTo(depth - 1)
	}
}

func decodePtr[T any](d *decoder, f func(*decoder, *T)) *T {
	if d.null() {
		return nil
	}
	v := new(T)
	f(d, v)
	return v
}

// maxAhead bounds the elements that are allocated before they are read.
const maxAhead = 256

func decodeList[E any](d *decoder, f func(*decoder, *E)) []E {
	if d.null() {
		return nil
	}
	n := d.listLen()
	list := make([]E, 0, min(n, maxAhead))
	for ; n > 0 && d.err == nil; n-- {
		var e E
		list = append(list, e)
		f(d, &list[len(list)-1])
	}
	return list
}

// decodeEach allocates each element on its own.
func decodeEach[T any](d *decoder, f func(*decoder, *T)) []*T {
	return decodeList(d, func(d *decoder, v **T) { *v = decodePtr(d, f) })
}

// decodeBlock allocates elements that live and die together in one piece.
func decodeBlock[T any](d *decoder, f func(*decoder, *T)) []*T {
	if d.null() {
		return nil
	}
	n := d.listLen()
	list := make([]*T, 0, min(n, maxAhead))
	var block []T
	for ; n > 0 && d.err == nil; n-- {
		if d.null() {
			list = append(list, nil)
			continue
		}
		if len(block) == 0 {
			block = make([]T, min(n, maxAhead))
		}
		f(d, &block[0])
		list, block = append(list, &block[0]), block[1:]
	}
	return list
}

func decodeMap[V any](d *decoder, f func(*decoder, *V)) map[string]V {
	if d.null() {
		return nil
	}
	n := d.mapLen()
	m := make(map[string]V, min(n, maxAhead))
	for ; n > 0 && d.err == nil; n-- {
		k := d.str()
		var v V
		f(d, &v)
		m[k] = v
	}
	return m
}

func copyPtr[T any](v *T, deep func(*T)) *T {
	if v == nil {
		return nil
	}
	c := *v
	if deep != nil {
		deep(&c)
	}
	return &c
}

func copyList[E any](list []E, deep func(*E)) []E {
	if list == nil {
		return nil
	}
	c := append(make([]E, 0, len(list)), list...)
	for i := range c {
		if deep != nil {
			deep(&c[i])
		}
	}
	return c
}

func copyMap[V any](m map[string]V, deep func(*V)) map[string]V {
	if m == nil {
		return nil
	}
	c := make(map[string]V, len(m))
	for k, v := range m {
		if deep != nil {
			deep(&v)
		}
		c[k] = v
	}
	return c
}
