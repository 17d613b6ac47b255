package cluster

import (
	"fmt"
	"slices"
	"sort"
)

// slot is where a record lies in its table. It stays while the record is replaced, so that an index holds four bytes for
// a record and is touched only when the record's place in it changes.
type slot uint32

// rows is a table at one moment: persistent structures, so that a copy is a view.
type rows struct {
	edit    edit
	ids     tree[slot] // by primary key
	records vector     // by slot
	by      []tree[*set]
	free    []slot // of deleted records; for the writer only
}

func newRows(t *Table, e edit) *rows { return &rows{edit: e, by: make([]tree[*set], len(t.indexes))} }

// vector is a persistent array: slots → records.
type vector struct {
	root  *chunk
	shift uint // bits of a slot below the root's own five
	n     slot // slots ever used
}

const (
	chunkBits = 5
	chunkLen  = 1 << chunkBits
)

// chunk has records, or chunks of the level below.
type chunk struct {
	edit    edit
	records []any
	kids    []*chunk
}

func (v *vector) get(s slot) any {
	c := v.root
	for shift := v.shift; shift > 0; shift -= chunkBits {
		c = c.kids[s>>shift&(chunkLen-1)]
	}
	return c.records[s&(chunkLen-1)]
}

func (v *vector) set(e edit, s slot, record any) {
	if v.root == nil {
		v.root = &chunk{edit: e, records: make([]any, chunkLen)}
	}
	for s>>v.shift >= chunkLen {
		kids := make([]*chunk, chunkLen)
		kids[0] = v.root
		v.root = &chunk{edit: e, kids: kids}
		v.shift += chunkBits
	}
	v.n = max(v.n, s+1)
	at := &v.root
	for shift := v.shift; ; shift -= chunkBits {
		c := (*at).own(e, shift == 0)
		*at = c
		if shift == 0 {
			c.records[s&(chunkLen-1)] = record
			return
		}
		at = &c.kids[s>>shift&(chunkLen-1)]
	}
}

// own gives the chunk itself if the edit made it, a copy, or a new one.
func (c *chunk) own(e edit, leaf bool) *chunk {
	switch {
	case c == nil && leaf:
		return &chunk{edit: e, records: make([]any, chunkLen)}
	case c == nil:
		return &chunk{edit: e, kids: make([]*chunk, chunkLen)}
	case c.edit == e:
		return c
	case leaf:
		return &chunk{edit: e, records: slices.Clone(c.records)}
	}
	return &chunk{edit: e, kids: slices.Clone(c.kids)}
}

// set is the slots of the records that an index holds under one value, in the order of their primary keys: a run of
// slots, or runs of them when there are many.
type set struct {
	edit  edit
	slots []slot
	runs  []*set
	one   [1]slot // room for the first, which most sets end with
}

// setOf makes a set of one slot.
func setOf(e edit, s slot) *set {
	x := &set{edit: e, one: [1]slot{s}}
	x.slots = x.one[:]
	return x
}

// maxRun bounds the slots of a run.
const maxRun = 512

func (x *set) own(e edit) *set {
	if x.edit == e {
		return x
	}
	return &set{edit: e, slots: append(make([]slot, 0, len(x.slots)+1), x.slots...), runs: slices.Clone(x.runs)}
}

// find says where key is, or would be, among n slots.
func find(n int, key string, at func(int) string) int {
	return sort.Search(n, func(i int) bool { return at(i) >= key })
}

// add puts a slot in its place by its record's key; keyOf gives the keys of those that are there.
func (x *set) add(e edit, s slot, key string, keyOf func(slot) string) *set {
	x = x.own(e)
	if x.runs != nil {
		i := max(0, sort.Search(len(x.runs), func(i int) bool { return keyOf(x.runs[i].slots[0]) > key })-1)
		run := x.runs[i].add(e, s, key, keyOf)
		x.runs[i] = run
		if run.runs != nil { // it was split
			x.runs = slices.Replace(x.runs, i, i+1, run.runs...)
		}
		return x
	}
	i := find(len(x.slots), key, func(i int) string { return keyOf(x.slots[i]) })
	x.slots = slices.Insert(x.slots, i, s)
	if n := len(x.slots); n > maxRun {
		at := n / 2
		if i == n-1 {
			at = i // keys come in order
		}
		x.runs = []*set{{edit: e, slots: slices.Clone(x.slots[:at])}, {edit: e, slots: slices.Clone(x.slots[at:])}}
		x.slots = nil
	}
	return x
}

// remove takes a slot out; nil when nothing is left.
func (x *set) remove(e edit, s slot, key string, keyOf func(slot) string) *set {
	x = x.own(e)
	if x.runs != nil {
		i := max(0, sort.Search(len(x.runs), func(i int) bool { return keyOf(x.runs[i].slots[0]) > key })-1)
		if run := x.runs[i].remove(e, s, key, keyOf); run != nil {
			x.runs[i] = run
		} else if x.runs = slices.Delete(x.runs, i, i+1); len(x.runs) == 0 {
			return nil
		}
		return x
	}
	i := find(len(x.slots), key, func(i int) string { return keyOf(x.slots[i]) })
	if x.slots = slices.Delete(x.slots, i, i+1); len(x.slots) == 0 {
		return nil
	}
	return x
}

// each calls fn for the slots in order until it returns false.
func (x *set) each(fn func(slot) bool) bool {
	for _, s := range x.slots {
		if !fn(s) {
			return false
		}
	}
	for _, run := range x.runs {
		if !run.each(fn) {
			return false
		}
	}
	return true
}

// atRest is a record that has come to its end and is kept for whoever looks back: as AppendStored writes it, in one
// piece without a pointer. It takes a third of the memory, and the garbage collector has nothing to walk through in it.
type atRest struct {
	table  *Table
	key    string
	ended  int64 // Unix nanoseconds
	stored []byte
}

// settle gives a record as rows keep it.
func (t *Table) settle(key string, record any) any {
	if t.rests == nil {
		return record
	}
	ended, rests := t.rests(record)
	if !rests {
		return record
	}
	buf := scratch.Get().(*[]byte)
	defer scratch.Put(buf)
	*buf = AppendStored((*buf)[:0], record)
	return &atRest{t, key, ended, slices.Clone(*buf)}
}

// wake gives the record itself.
func (r *atRest) wake() any {
	record := r.table.New()
	d := decoder{left: r.stored, short: true}
	if err := d.record(record); err != nil {
		panic(fmt.Sprintf("table %s: record %s: %v", r.table.Name, r.key, err)) // AppendStored's own output
	}
	return record
}

// at gives the record in a slot.
func (r *rows) at(s slot) any {
	kept := r.records.get(s)
	if rest, ok := kept.(*atRest); ok {
		return rest.wake()
	}
	return kept
}

// get gives the record of a primary key.
func (r *rows) get(key string) any {
	if s, ok := r.ids.get(key); ok {
		return r.at(s)
	}
	return nil
}

// put stores a record under its key and gives the one whose place it takes.
func (r *rows) put(e edit, t *Table, key string, record any) (old any) {
	s, ok := r.ids.get(key)
	if ok {
		old = r.at(s)
	} else {
		if n := len(r.free); n > 0 {
			s, r.free = r.free[n-1], r.free[:n-1]
		} else {
			s = r.records.n
		}
		r.ids.set(e, key, s)
	}
	for i, x := range t.indexes {
		was, is := "", x.of(record)
		if old != nil {
			was = x.of(old)
		}
		if was != is {
			r.unindex(e, t, i, was, s, key)
			r.index(e, t, i, is, s, key)
		}
	}
	r.records.set(e, s, t.settle(key, record))
	return old
}

// delete forgets the record of a key and gives it, nil when there is none.
func (r *rows) delete(e edit, t *Table, key string) (old any) {
	s, ok := r.ids.get(key)
	if !ok {
		return nil
	}
	old = r.at(s)
	for i, x := range t.indexes {
		r.unindex(e, t, i, x.of(old), s, key)
	}
	r.ids.delete(e, key)
	r.records.set(e, s, nil)
	r.free = append(r.free, s)
	return old
}

func (r *rows) index(e edit, t *Table, i int, value string, s slot, key string) {
	if value == "" {
		return
	}
	if x, ok := r.by[i].get(value); !ok {
		r.by[i].set(e, value, setOf(e, s))
	} else if grown := x.add(e, s, key, r.keyOf(t)); grown != x {
		r.by[i].set(e, value, grown)
	}
}

func (r *rows) unindex(e edit, t *Table, i int, value string, s slot, key string) {
	if value == "" {
		return
	}
	x, _ := r.by[i].get(value)
	switch less := x.remove(e, s, key, r.keyOf(t)); less {
	case nil:
		r.by[i].delete(e, value)
	case x:
	default:
		r.by[i].set(e, value, less)
	}
}

// keyOf gives the primary key of a slot's record.
func (r *rows) keyOf(t *Table) func(slot) string {
	return func(s slot) string {
		kept := r.records.get(s)
		if rest, ok := kept.(*atRest); ok {
			return rest.key
		}
		return t.key(kept)
	}
}
