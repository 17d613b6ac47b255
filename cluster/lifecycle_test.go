package cluster

import "testing"

func TestTasksOverlap(t *testing.T) {
	r := &AllocatedResources{Tasks: map[string]*AllocatedTaskResources{}, TaskLifecycles: map[string]*TaskLifecycle{
		"init": {Hook: HookPrestart}, "mesh": {Hook: HookPrestart, Sidecar: true}, "warm": {Hook: HookPoststart},
		"logs": {Hook: HookPoststart, Sidecar: true}, "clean": {Hook: HookPoststop},
	}}
	for name, mib := range map[string]int64{"init": 500, "mesh": 10, "warm": 20, "logs": 30, "clean": 100, "web": 200} {
		r.Tasks[name] = &AllocatedTaskResources{Cpu: AllocatedCPU{CpuShares: 100}, Memory: AllocatedMemory{MemoryMB: mib}}
	}
	u := NewNodeUse(testNode("00000000"))
	use := func(memory, cpu int64) {
		t.Helper()
		u.Add(&Allocation{ID: "a", AllocatedResources: r})
		if u.Memory != memory || u.CPU != cpu {
			t.Errorf("%d MiB and %d MHz are held, want %d and %d", u.Memory, u.CPU, memory, cpu)
		}
		u.Remove(&Allocation{ID: "a", AllocatedResources: r})
		if u.Memory != 0 || u.CPU != 0 {
			t.Errorf("of nothing %d MiB and %d MHz are left", u.Memory, u.CPU)
		}
	}
	use(540, 400) // init before the others, the sidecars beside it
	r.Tasks["init"].Memory.MemoryMB = 50
	use(260, 400)
	r.Tasks["clean"].Memory.MemoryMB = 300
	use(340, 400)
	r.TaskLifecycles = nil
	use(610, 600)
}

func TestLifecyclesNeedNewRules(t *testing.T) {
	j := testJob("web", 1)
	if n := j.NeedsRules(); n != 0 {
		t.Fatalf("a plain job needs rules %d", n)
	}
	j.TaskGroups[0].Tasks[0].Lifecycle = &TaskLifecycle{Hook: HookPrestart}
	if n := j.NeedsRules(); n != rulesEngine {
		t.Fatalf("a job with a lifecycle block needs rules %d, want %d", n, rulesEngine)
	}
}

// TestMovableNeedsRules: servers that do not know it would keep another job than the others.
func TestMovableNeedsRules(t *testing.T) {
	j := &Job{TaskGroups: []*TaskGroup{{Preempt: &PreemptPolicy{Reclaim: true}}}}
	if n := j.NeedsRules(); n != rulesEngine {
		t.Errorf("work that may be preempted needs rules %d, want %d", n, rulesEngine)
	}
	j.TaskGroups[0].Preempt.Move = true
	if n := j.NeedsRules(); n != rulesMoves {
		t.Errorf("work that may be moved needs rules %d, want %d", n, rulesMoves)
	}
}
