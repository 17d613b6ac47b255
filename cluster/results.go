package cluster

import (
	"slices"
	"strings"
)

// resultEntry keeps one command's result for retries.
type resultEntry struct {
	RequestID string
	Seq       uint64
	Result    Result
}

// results are the newest results in the order in which they came: blocks that fill up one by one. A copy is a view,
// because nothing is written below next.
type results struct {
	blocks      []*[resultBlock]resultEntry
	first, next int // positions; blocks[0] begins at a multiple of resultBlock at or below first
}

const resultBlock = 1024

// at is the entry at a position between first and next.
func (r *results) at(i int) *resultEntry {
	base := r.first - r.first%resultBlock
	return &r.blocks[(i-base)/resultBlock][i%resultBlock]
}

// add puts an entry behind the others.
func (r *results) add(e resultEntry) {
	if r.next%resultBlock == 0 {
		r.blocks = append(slices.Clone(r.blocks), new([resultBlock]resultEntry))
	}
	r.next++
	*r.at(r.next - 1) = e
}

// drop forgets the oldest entry and gives its request ID.
func (r *results) drop() string {
	id := r.at(r.first).RequestID
	if r.first++; r.first%resultBlock == 0 {
		r.blocks = slices.Clone(r.blocks[1:])
	}
	return id
}

// sorted gives all entries by request ID.
func (r *results) sorted() []*resultEntry {
	list := make([]*resultEntry, 0, r.next-r.first)
	for i := r.first; i < r.next; i++ {
		list = append(list, r.at(i))
	}
	slices.SortFunc(list, func(a, b *resultEntry) int { return strings.Compare(a.RequestID, b.RequestID) })
	return list
}
