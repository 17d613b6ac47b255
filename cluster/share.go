package cluster

import "hash/maphash"

// interner keeps one copy of what is met again and again: strings (statuses, names, IDs of nodes) and parts of records
// (policies, resources, summaries). It is a cache of fixed size in which the new takes the place of something older.
// What is shared changes no value, so its hash may differ from process to process.
type interner struct {
	seed   maphash.Seed
	slots  []string
	values []value
	lost   int // strings that had to go since slots has its size
	max    int // slots at most
}

// internBits is how many strings a state shares at a time, as a power of two; restoreBits while it is restored,
// when records come in the order of their IDs and like ones lie far apart.
const (
	internBits  = 14
	restoreBits = 19
)

// maxInterned bounds the length of shared strings, in bytes.
const maxInterned = 128

// newInterner makes an interner of at most 2^bits strings.
func newInterner(bits int) *interner {
	few := min(bits, 8)
	return &interner{seed: maphash.MakeSeed(), slots: make([]string, 1<<few), values: make([]value, 1<<few), max: 1 << bits}
}

// grow doubles the slots, once as many strings have had to go as there are.
func (x *interner) grow() {
	x.lost = 0
	old := x.slots
	x.slots = make([]string, 2*len(old))
	for _, s := range old {
		if s != "" {
			x.slots[x.place(maphash.String(x.seed, s))] = s
		}
	}
	if len(x.slots) <= 1<<objectBits {
		values := x.values
		x.values = make([]value, len(x.slots))
		for _, v := range values {
			if v.v != nil {
				*x.find([]byte(v.stored)) = v
			}
		}
	}
}

func (x *interner) place(hash uint64) int { return int(hash & uint64(len(x.slots)-1)) }

func (x *interner) str(b []byte) string {
	if len(b) == 0 {
		return ""
	}
	if len(b) > maxInterned {
		return string(b)
	}
	slot := &x.slots[x.place(maphash.Bytes(x.seed, b))]
	if *slot == string(b) {
		return *slot
	}
	s := string(b)
	if *slot != "" {
		x.lost++
	}
	*slot = s
	if x.lost == len(x.slots) && x.lost < x.max {
		x.grow()
	}
	return s
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
