package cluster

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
)

// BenchmarkNodeUse adds up what a thousand allocations hold of one node: what it
// costs to see whether one more fits.
func BenchmarkNodeUse(b *testing.B) {
	n := testNode("00000001-0000-4000-8000-000000000001")
	var allocs []*Allocation
	for i := range 1000 {
		allocs = append(allocs, Clone(&Allocation{
			ID: fmt.Sprint(i), NodeID: n.ID,
			AllocatedResources: &AllocatedResources{
				Tasks:  map[string]*AllocatedTaskResources{"t": {Cpu: AllocatedCPU{1}, Memory: AllocatedMemory{MemoryMB: 1}}},
				Shared: AllocatedSharedResources{DiskMB: 1, Ports: []PortMapping{{Label: "http", Value: 20000 + i}}},
			},
		}))
	}
	slices.SortFunc(allocs, func(a, b *Allocation) int { return strings.Compare(a.ID, b.ID) })
	b.Run("anew", func(b *testing.B) {
		for b.Loop() {
			use := NewNodeUse(n)
			if use.Follow(n, allocs); use.Fault() != "" {
				b.Fatal(use.Fault())
			}
		}
	})
	b.Run("one-more", func(b *testing.B) {
		use := NewNodeUse(n)
		for i := 0; b.Loop(); i++ {
			if use.Follow(n, allocs[:900+i%100]); use.Fault() != "" {
				b.Fatal(use.Fault())
			}
		}
	})
}

// TestUseFollows compares the differences with adding up anew, over lists that
// change at random, conflicts among them.
func TestUseFollows(t *testing.T) {
	r := seeded(t)
	n := testNode("00000001-0000-4000-8000-000000000001")
	make1 := func(id int) *Allocation {
		a := &Allocation{ID: fmt.Sprintf("%03d", id), AllocatedResources: &AllocatedResources{Tasks: map[string]*AllocatedTaskResources{
			"a": {Cpu: AllocatedCPU{r.Int64N(10)}}, "b": {Memory: AllocatedMemory{MemoryMB: r.Int64N(10)}},
		}}}
		if r.IntN(3) == 0 {
			a.AllocatedResources.Shared.Ports = []PortMapping{{Value: 20000 + r.IntN(60)}}
		}
		if r.IntN(3) == 0 {
			a.AllocatedResources.Tasks["a"].Devices = []*AllocatedDevice{{DeviceIDs: []string{fmt.Sprint("GPU-", r.IntN(30))}}}
		}
		if r.IntN(3) == 0 {
			a.AllocatedResources.Tasks["b"].Devices = []*AllocatedDevice{{DeviceIDs: []string{fmt.Sprint("GPU-", r.IntN(30))}, Milli: r.Int64N(500), MiB: 1 + r.Int64N(500)}}
		}
		return a
	}
	held := map[string]*Allocation{}
	followed := NewNodeUse(n)
	for range 5000 {
		for range r.IntN(4) {
			a := make1(r.IntN(40))
			switch r.IntN(3) {
			case 0:
				delete(held, a.ID)
			case 1:
				held[a.ID] = a
			case 2: // the same with another status
				if old := held[a.ID]; old != nil {
					c := *old
					held[a.ID] = &c
				}
			}
		}
		var list []*Allocation
		for _, id := range sortedKeys(held) {
			list = append(list, held[id])
		}
		followed.Follow(n, list)
		anew := NewNodeUse(n)
		for _, a := range list {
			anew.Add(a)
		}
		if len(anew.faults) > 0 {
			if len(followed.faults) == 0 {
				t.Fatalf("a conflict was overlooked: %v", anew.faults)
			}
			continue
		}
		if len(followed.faults) > 0 { // the one that leaves, and the one that comes, are told apart
			t.Fatalf("a conflict that is none: %v", followed.faults)
		}
		if !followed.equal(anew) {
			t.Fatalf("followed %+v, anew %+v", followed, anew)
		}
	}
}

func (u *NodeUse) equal(v *NodeUse) bool {
	return u.CPU == v.CPU && u.Memory == v.Memory && u.Disk == v.Disk && maps.Equal(u.Devices, v.Devices) && slices.Equal(u.ports, v.ports)
}
