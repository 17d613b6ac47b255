package sim

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// TestConsolidation places pods of many sizes on nodes that they break up. Pods are moved to make room, at most four for
// one that is placed, and each is placed again where it was to go: Replay fails else.
func TestConsolidation(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	nodes, pods := strings.Builder{}, strings.Builder{}
	fmt.Fprintln(&nodes, "sn,cpu_milli,memory_mib,gpu,model")
	for i := range 20 {
		fmt.Fprintf(&nodes, "node-%02d,%d,%d,%d,%s\n", i, 64_000, 262_144, []int{4, 8}[i%2], []string{"A10", "T4"}[i%3/2])
	}
	fmt.Fprintln(&pods, "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time")
	for i := range 300 {
		gpus, milli, model := 1, 1000, ""
		switch rnd.IntN(4) {
		case 0:
			milli = 100 + 100*rnd.IntN(6)
		case 1:
			gpus = 1 << rnd.IntN(4)
		case 2:
			model = []string{"A10", "T4"}[rnd.IntN(2)]
		}
		fmt.Fprintf(&pods, "pod-%04d,%d,%d,%d,%d,%s,%s,Running,0,10,0\n", i, 1000+rnd.IntN(4000), 4096, gpus, milli, model, []string{"BE", "BE", "LS"}[rnd.IntN(3)])
	}
	trace, err := ReadTrace(strings.NewReader(nodes.String()), strings.NewReader(pods.String()))
	if err != nil {
		t.Fatal(err)
	}
	moves := 0
	for seed := range uint64(4) {
		with, err := trace.Replay("consolidate", seed)
		if err != nil {
			t.Fatal(err)
		}
		without, err := trace.Replay("fgd", seed)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("seed %d: %d placed with %d moves, %d without; %.2f %% and %.2f %% allocated at 90 %%", seed, with.Placed, with.Moves, without.Placed, with.At(90), without.At(90))
		if with.Moves > 4*with.Placed || without.Moves > 0 {
			t.Errorf("seed %d: %d and %d moves", seed, with.Moves, without.Moves)
		}
		moves += with.Moves
	}
	if moves == 0 {
		t.Error("nothing was moved: the test shows nothing")
	}
}
