package main

import "testing"

func TestSmallHeapsMayGrow(t *testing.T) {
	for live, want := range map[uint64]int{0: 1000, 1 << 20: 1000, gcRoom / 4: 400, gcRoom: 100, 100 * gcRoom: 100} {
		if got := gcPercent(live); got != want {
			t.Errorf("%d bytes in use: %d %%, not %d %%", live, got, want)
		}
	}
}
