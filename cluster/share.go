package cluster

import "hash/maphash"

// interner keeps one copy of what is met again and again: strings (statuses, names, IDs of nodes) and parts of records
// (policies, resources, summaries). It is a cache of fixed size in which the new takes the place of something older.
// What is shared changes no value, so its hash may differ from process to process.
type interner struct {
	seed   maphash.Seed
	slots  []string
	values []value
}

// internBits is how many strings a state shares at a time, as a power of two; restoreBits while it is restored,
// when records come in the order of their IDs and like ones lie far apart.
const (
	internBits  = 14
	restoreBits = 19
)

// maxInterned bounds the length of shared strings, in bytes.
const maxInterned = 128

// newInterner makes an interner of 2^bits strings.
func newInterner(bits int) *interner {
	return &interner{seed: maphash.MakeSeed(), slots: make([]string, 1<<bits), values: make([]value, 1<<min(bits, objectBits))}
}

func (x *interner) str(b []byte) string {
	if len(b) == 0 {
		return ""
	}
	if len(b) > maxInterned {
		return string(b)
	}
	slot := &x.slots[maphash.Bytes(x.seed, b)&uint64(len(x.slots)-1)]
	if *slot != string(b) {
		*slot = string(b)
	}
	return *slot
}

// value is what a stored form stands for.
type value struct {
	stored string
	v      any
}

// objectBits is how many values a state shares at a time, as a power of two; maxShared bounds the stored form of
// one, in bytes.
const (
	objectBits = 12
	maxShared  = 512
)

// find gives the place of a stored form, which may hold another.
func (x *interner) find(stored []byte) *value {
	return &x.values[maphash.Bytes(x.seed, stored)&uint64(len(x.values)-1)]
}

// decodeShared reads a value that many records have alike: all of them get the same one. So nobody may change it in place.
func decodeShared[T any](d *decoder, read func(*decoder) T) T {
	if d.shared == nil {
		return read(d)
	}
	from := d.left
	d.skip()
	stored := from[:len(from)-len(d.left)]
	if d.err != nil || len(stored) < 3 || len(stored) > maxShared {
		d.left = from
		return read(d)
	}
	slot := d.shared.find(stored)
	if v, ok := slot.v.(T); ok && slot.stored == string(stored) {
		return v
	}
	d.left = from
	v := read(d)
	if d.err == nil {
		*slot = value{string(stored), v}
	}
	return v
}
