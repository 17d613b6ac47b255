package cluster

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

func limit(n int64) *int64 { return &n }

// gpuQuota makes a quota of so many whole GPUs.
func gpuQuota(name string, gpus int64) *Quota {
	return &Quota{Name: name, Limits: []*QuotaLimit{{Region: "global", Devices: []*QuotaDevice{{Name: "nvidia/gpu", Count: gpus}}}}}
}

// tenant registers a job in a namespace and gives it with its pending evaluation.
func (h *harness) tenant(namespace, id string, preemptible bool) (*Job, *Evaluation) {
	j := testJob(id, 4)
	j.Namespace = namespace
	if preemptible {
		j.TaskGroups[0].Preempt = &PreemptPolicy{Reclaim: true}
	}
	eval := h.id()
	h.must(&RegisterJob{Job: j, EvalID: eval})
	return h.Snapshot().Job(nil, JobKey{namespace, id}), h.Snapshot().Eval(nil, eval)
}

// grant tries to place an allocation with a device of a node; it says whether it was granted.
func (h *harness) grant(j *Job, e *Evaluation, n *Node, device string) (*Allocation, bool) {
	h.Helper()
	a := testAlloc(h, e, j, n, device)
	res := h.must(&ApplyPlans{Plans: []*Plan{{EvalID: e.ID, Namespace: j.Namespace, JobID: j.ID, JobVersion: j.Version, Place: []*Allocation{a}}}})
	return a, len(res.Plans[0].Refused) == 0 && !res.Plans[0].Stale
}

func (h *harness) ends(a *Allocation) {
	h.Helper()
	h.must(&UpdateAllocs{NodeID: a.NodeID, Allocs: []*Allocation{{ID: a.ID, ClientStatus: AllocClientComplete}}})
}

func (h *harness) refused(c Command, says string) {
	h.Helper()
	if res := h.do(c); res.Err == nil || !strings.Contains(res.Err.Text, says) {
		h.Fatalf("%T: %v, want a refusal that says %q", c, res.Err, says)
	}
}

func TestNamespaces(t *testing.T) {
	h := newHarness(t)
	stray := testJob("a", 1)
	stray.Namespace = "team"
	h.refused(&RegisterJob{Job: stray, EvalID: h.id()}, "nonexistent namespace")
	h.refused(&UpsertNamespaces{Namespaces: []*Namespace{{Name: "team", Quota: "q"}}}, `namespace "team" using non-existent quota "q"`)
	h.refused(&UpsertNamespaces{Namespaces: []*Namespace{{Name: "*"}}}, `invalid name "*"`)
	h.refused(&UpsertNamespaces{Namespaces: []*Namespace{{Name: "team", Meta: map[string]string{MetaLendPercent: "101"}}}}, "0 to 100")
	h.must(&UpsertQuotas{Quotas: []*Quota{gpuQuota("q", 1)}})
	h.must(&UpsertNamespaces{Namespaces: []*Namespace{{
		Name: "team", Quota: "q", Capabilities: &NamespaceCapabilities{DisabledTaskDrivers: []string{"exec"}},
		NodePoolConfiguration: &NamespaceNodePools{Default: "gold", Allowed: []string{"def*"}},
	}}})
	h.refused(&UpsertNamespaces{Namespaces: []*Namespace{{Name: "other", Quota: "q", Meta: map[string]string{MetaCohort: "c"}}}}, "cannot share")
	wrong := testJob("w", 1)
	wrong.Namespace, wrong.NodePool, wrong.TaskGroups[0].Tasks[0].Driver = "team", "silver", "exec"
	h.refused(&RegisterJob{Job: wrong, EvalID: h.id()}, `task driver "exec" is not allowed in namespace "team"`+"\n"+`node_pool: node pool "silver"`)

	n := testNode(h.id())
	h.must(&RegisterNode{Node: n})
	j, e := h.tenant("team", "a", false)
	a, _ := h.grant(j, e, n, n.NodeResources.Devices[0].Instances[0].ID)
	h.refused(&DeleteNamespaces{Names: []string{"team"}}, "1 allocations")
	h.ends(a)
	h.refused(&DeleteNamespaces{Names: []string{"team"}}, "1 non-terminal jobs: a")
	h.must(&DeregisterJob{Namespace: "team", JobID: "a"})
	for _, open := range h.Snapshot().OpenEvalsByJob(j.Key()) {
		h.must(&UpdateEvals{Evals: []*Evaluation{answered(open)}})
	}
	h.refused(&DeleteQuotas{Names: []string{"q"}}, "used by 1 namespaces: team")
	h.must(&DeleteNamespaces{Names: []string{"team"}})
	if got := h.Snapshot().Jobs(nil, "team", ""); len(got) != 0 {
		t.Errorf("the dead jobs of the namespace are still there: %v", got)
	}
	h.must(&DeleteQuotas{Names: []string{"q"}})
	h.refused(&DeleteNamespaces{Names: []string{DefaultNamespace}}, "can not delete default namespace")
	if all := h.Snapshot().Namespaces(nil, "d"); len(all) != 1 || all[0].Name != DefaultNamespace {
		t.Errorf("namespaces: %v", all)
	}
}

// TestQuotaIsKept: a plan is refused on the nodes on which it would take more than the quota, and room
// appears when a node reports an end, or with the quota.
func TestQuotaIsKept(t *testing.T) {
	h := newHarness(t)
	nodes := []*Node{testNode(h.id()), testNode(h.id())}
	for _, n := range nodes {
		h.must(&RegisterNode{Node: n})
	}
	gpu := func(n, i int) string { return nodes[n].NodeResources.Devices[0].Instances[i].ID }
	h.must(&UpsertQuotas{Quotas: []*Quota{gpuQuota("q", 1)}})
	h.must(&UpsertNamespaces{Namespaces: []*Namespace{{Name: "x", Quota: "q"}, {Name: "y", Quota: "q"}}})
	j, e := h.tenant("x", "j", true)
	res := h.must(&ApplyPlans{Plans: []*Plan{{
		EvalID: e.ID, Namespace: "x", JobID: "j", JobVersion: j.Version,
		Place: []*Allocation{testAlloc(h, e, j, nodes[0], gpu(0, 0)), testAlloc(h, e, j, nodes[1], gpu(1, 0))},
	}}})
	if got := res.Plans[0].Refused; len(got) != 1 {
		t.Fatalf("refused: %v, want one of the two nodes", got)
	}
	held := h.Snapshot().AllocsByJob(nil, j.Key())
	if len(held) != 1 {
		t.Fatalf("%d allocations, want 1", len(held))
	}
	j2, e2 := h.tenant("y", "j", false)
	if _, ok := h.grant(j2, e2, nodes[1], gpu(1, 1)); ok {
		t.Fatal("two namespaces hold more than the quota that they share")
	}
	h.must(&ApplyPlans{Plans: []*Plan{{EvalID: e.ID, Namespace: "x", JobID: "j", Stop: []*AllocStop{{AllocID: held[0].ID, DesiredStatus: AllocDesiredStop}}}}})
	if _, ok := h.grant(j2, e2, nodes[1], gpu(1, 1)); ok {
		t.Fatal("what is asked to stop counts until its node reports its end")
	}
	capacity := h.Snapshot().Index(nil, IndexCapacity)
	h.ends(held[0])
	if now := h.Snapshot().Index(nil, IndexCapacity); now <= capacity {
		t.Errorf("nobody is told of the room: index %d", now)
	}
	if _, ok := h.grant(j2, e2, nodes[1], gpu(1, 1)); !ok {
		t.Fatal("there is room by the quota")
	}
	capacity = h.Snapshot().Index(nil, IndexCapacity)
	h.must(&UpsertQuotas{Quotas: []*Quota{gpuQuota("q", 2)}})
	if now := h.Snapshot().Index(nil, IndexCapacity); now <= capacity {
		t.Errorf("nobody is told of the greater quota: index %d", now)
	}
	if _, ok := h.grant(j2, e2, nodes[0], gpu(0, 1)); !ok {
		t.Fatal("there is room by the greater quota")
	}
}

// TestCohort: preemptible work borrows what others leave, within the limits of both, other work does not, and
// nobody is kept from the own quota.
func TestCohort(t *testing.T) {
	h := newHarness(t)
	var devices []string
	n := testNode(h.id())
	instances := &n.NodeResources.Devices[0].Instances
	for i := range 12 {
		*instances = append(*instances, &NodeDevice{ID: fmt.Sprintf("GPU-%d-more", i), Healthy: true})
	}
	for _, d := range *instances {
		devices = append(devices, d.ID)
	}
	n.NodeResources.Cpu.CpuShares, n.NodeResources.Memory.MemoryMB = 1e6, 1e6
	h.must(&RegisterNode{Node: n})
	h.must(&UpsertQuotas{Quotas: []*Quota{gpuQuota("qa", 2), gpuQuota("qb", 4)}})
	member := func(name, quota string, meta ...string) *Namespace {
		ns := &Namespace{Name: name, Quota: quota, Meta: map[string]string{MetaCohort: "ml"}}
		for i := 0; i < len(meta); i += 2 {
			ns.Meta[meta[i]] = meta[i+1]
		}
		return ns
	}
	h.must(&UpsertNamespaces{Namespaces: []*Namespace{member("a", "qa", MetaBorrowPercent, "100"), member("b", "qb", MetaLendPercent, "75")}})
	take := func(j *Job, e *Evaluation, want bool) *Allocation {
		t.Helper()
		a, ok := h.grant(j, e, n, devices[0])
		if ok != want {
			t.Fatalf("granted to %s: %v, want %v; %+v", j.Namespace, ok, want, h.Snapshot().Allowance(j.Namespace, nil))
		}
		if ok {
			devices = devices[1:]
		}
		return a
	}
	soft, se := h.tenant("a", "soft", true)
	firm, fe := h.tenant("a", "firm", false)
	take(firm, fe, true)
	take(firm, fe, true)
	take(firm, fe, false) // not beyond the quota, though b lends
	take(soft, se, true)
	take(soft, se, true)
	take(soft, se, false) // a borrows 100 % of 2 at most
	borrowed := h.Snapshot().Borrowed("a")
	if len(borrowed) != 1 || borrowed[0].Name != "nvidia/gpu" || borrowed[0].Amount != 2000 {
		t.Fatalf("borrowed: %+v", borrowed)
	}
	if got := borrowed[0].Of(&AllocatedResources{Tasks: map[string]*AllocatedTaskResources{"t": {Devices: []*AllocatedDevice{{Vendor: "nvidia", Type: "gpu", Milli: 250}}}}}); got != 250 {
		t.Errorf("a quarter is %d thousandths", got)
	}
	h.must(&UpsertNamespaces{Namespaces: []*Namespace{member("a", "qa"), member("b", "qb", MetaLendPercent, "75")}})
	take(soft, se, true)
	take(soft, se, false) // b lends 75 % of 4 at most
	other, oe := h.tenant("b", "other", false)
	for range 4 { // b is not kept from its own, though 3 of it are lent
		take(other, oe, true)
	}
	take(other, oe, false)
	more, me := h.tenant("b", "more", true)
	take(more, me, false) // nobody lends
	if h.Snapshot().Borrowed("b") != nil {
		t.Error("b has borrowed nothing")
	}
	h.must(&DeleteNamespaces{Names: nil})
}

func TestDevicesCount(t *testing.T) {
	gpu := func(d AllocatedDevice) *AllocatedResources {
		d.Vendor, d.Type, d.Name = "nvidia", "gpu", "H100"
		return &AllocatedResources{Tasks: map[string]*AllocatedTaskResources{"t": {Devices: []*AllocatedDevice{&d}}}}
	}
	for _, c := range []struct {
		name, limit string
		res         *AllocatedResources
		want        int64
	}{
		{"two whole", "nvidia/gpu", gpu(AllocatedDevice{DeviceIDs: []string{"a", "b"}, MemoryMiB: 1000}), 2000},
		{"thousandths of them", "nvidia/gpu-milli", gpu(AllocatedDevice{DeviceIDs: []string{"a", "b"}}), 2000},
		{"their memory", "nvidia/gpu-mib", gpu(AllocatedDevice{DeviceIDs: []string{"a", "b"}, MemoryMiB: 1000}), 2000},
		{"a quarter", "gpu", gpu(AllocatedDevice{DeviceIDs: []string{"a"}, Milli: 250, MiB: 200, MemoryMiB: 1000}), 250},
		{"with most of the memory", "nvidia/gpu/H100", gpu(AllocatedDevice{DeviceIDs: []string{"a"}, Milli: 250, MiB: 801, MemoryMiB: 1000}), 801},
		{"memory alone, rounded up", "nvidia/gpu", gpu(AllocatedDevice{DeviceIDs: []string{"a"}, MiB: 1, MemoryMiB: 3}), 334},
		{"memory of one that is not known", "nvidia/gpu", gpu(AllocatedDevice{DeviceIDs: []string{"a"}, MiB: 1}), 1000},
		{"another model", "nvidia/gpu/A100", gpu(AllocatedDevice{DeviceIDs: []string{"a"}}), 0},
		{"another kind", "nvidia/mig-1g.10gb", gpu(AllocatedDevice{DeviceIDs: []string{"a"}}), 0},
	} {
		u := NewUsage("x", c.res, false)
		if got := deviceDimension(c.limit).of(&u.Total); got != c.want {
			t.Errorf("%s: %d of %s, want %d", c.name, got, c.limit, c.want)
		}
		if u.Add(u.Clone(), -1); len(u.Total.Devices) != 0 || u.Allocs != 0 {
			t.Errorf("%s: something is left: %+v", c.name, u)
		}
	}
}

func TestQuotaFaults(t *testing.T) {
	q := &Quota{Name: "q q", Limits: []*QuotaLimit{{Devices: []*QuotaDevice{{Name: "nvidia/gpu", Count: 1}, {Name: "nvidia/gpu-milli", Count: 1}, {Name: "a//b"}, {Name: "x", Count: -1}}}}}
	faults := strings.Join(q.Faults(), "\n")
	for _, want := range []string{"invalid name", "limits the same as nvidia/gpu", "must be named TYPE", "is -1"} {
		if !strings.Contains(faults, want) {
			t.Errorf("nothing says %q:\n%s", want, faults)
		}
	}
	a := &Allowance{}
	for _, b := range (&Quota{Limits: []*QuotaLimit{{CPU: limit(100), MemoryMB: limit(0), MemoryMaxMB: limit(-1), Devices: []*QuotaDevice{{Name: "gpu", Count: 2}}}}}).bounds() {
		a.lines = append(a.lines, allowed{bound: b, ceiling: b.most})
	}
	by := NewUsage("x", &AllocatedResources{Tasks: map[string]*AllocatedTaskResources{"t": {
		Cpu: AllocatedCPU{200}, Memory: AllocatedMemory{MemoryMB: 5},
		Devices: []*AllocatedDevice{{Type: "gpu", DeviceIDs: []string{"a", "b"}}, {Type: "gpu", Milli: 250}},
	}}}, false)
	want := "cpu exhausted (200 needed > 100 limit)\nmemory_max exhausted (5 needed > 0 limit)\ngpu exhausted (2.25 needed > 2 limit)"
	if got := strings.Join(a.Exceeded(by), "\n"); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

// TestQuotasHold places and ends at random in a cohort: work that may not be preempted stays within its quota, and
// no placement borrows what nobody lends.
func TestQuotasHold(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 2))
	h := newHarness(t)
	n := testNode(h.id())
	n.NodeResources.Cpu.CpuShares, n.NodeResources.Memory.MemoryMB = 1e6, 1e6
	n.NodeResources.Devices[0].Instances = nil
	for i := range 40 {
		n.NodeResources.Devices[0].Instances = append(n.NodeResources.Devices[0].Instances, &NodeDevice{ID: fmt.Sprint("GPU-", i), Healthy: true})
	}
	h.must(&RegisterNode{Node: n})
	nominal, lends := map[string]int64{"a": 3, "b": 5, "c": 8}, map[string]int64{"a": 100, "b": 60, "c": 50}
	type work struct {
		job  *Job
		eval *Evaluation
	}
	var works []work
	for _, name := range []string{"a", "b", "c"} {
		h.must(&UpsertQuotas{Quotas: []*Quota{gpuQuota(name, nominal[name])}})
		h.must(&UpsertNamespaces{Namespaces: []*Namespace{{Name: name, Quota: name, Meta: map[string]string{MetaCohort: "x", MetaLendPercent: fmt.Sprint(lends[name])}}}})
		for _, preemptible := range []bool{true, false} {
			j, e := h.tenant(name, fmt.Sprint("j", preemptible), preemptible)
			works = append(works, work{j, e})
		}
	}
	held, free := map[*Allocation]work{}, []string{}
	for _, d := range n.NodeResources.Devices[0].Instances {
		free = append(free, d.ID)
	}
	granted, kept := 0, 0
	for range 300 {
		if r.IntN(3) == 0 {
			for a := range held { // whichever
				h.ends(a)
				free = append(free, a.AllocatedResources.Tasks["x"].Devices[0].DeviceIDs...)
				delete(held, a)
				break
			}
			continue
		}
		w := works[r.IntN(len(works))]
		used, firm := map[string]int64{}, map[string]int64{}
		for _, o := range held {
			used[o.job.Namespace]++
			if !o.job.Preemptible() {
				firm[o.job.Namespace]++
			}
		}
		name := w.job.Namespace
		idle := int64(0)
		for m := range nominal {
			if m == name {
				continue
			}
			if left := nominal[m] - used[m]; left < 0 {
				idle += left
			} else {
				idle += min(left, nominal[m]*lends[m]/100)
			}
		}
		want := used[name] < nominal[name]+max(0, idle)
		if !w.job.Preemptible() {
			want = want && firm[name] < nominal[name]
		}
		a, ok := h.grant(w.job, w.eval, n, free[0])
		if ok != want {
			t.Fatalf("%s preemptible=%v granted %v, want %v: used %v, firm %v", name, w.job.Preemptible(), ok, want, used, firm)
		}
		if !ok {
			kept++
			continue
		}
		granted++
		held[a], free = w, free[1:]
	}
	if granted < 20 || kept < 5 {
		t.Errorf("%d granted and %d refused: too few to say anything", granted, kept)
	}
}

// TestMaxParallel: no more children of a job run side by side than it allows.
func TestMaxParallel(t *testing.T) {
	h := newHarness(t)
	n := testNode(h.id())
	h.must(&RegisterNode{Node: n})
	parent := testJob("p", 1)
	parent.Type, parent.TaskGroups[0].Update = JobTypeBatch, nil
	parent.ParameterizedJob, parent.Meta = &ParameterizedJobConfig{}, map[string]string{MetaMaxParallel: "2"}
	h.must(&RegisterJob{Job: parent})
	var plans []*Plan
	for range 3 {
		eval := h.id()
		res := h.must(&DispatchJob{Namespace: DefaultNamespace, JobID: "p", EvalID: eval})
		child, e := h.Snapshot().Job(nil, JobKey{DefaultNamespace, res.JobID}), h.Snapshot().Eval(nil, eval)
		plans = append(plans, &Plan{EvalID: e.ID, Namespace: DefaultNamespace, JobID: child.ID, Place: []*Allocation{testAlloc(h, e, child, n)}, Evals: []*Evaluation{answered(e)}})
	}
	res := h.must(&ApplyPlans{Plans: plans}).Plans
	if len(res[0].Refused)+len(res[1].Refused) != 0 || len(res[2].Refused) != 1 {
		t.Fatalf("results %+v, want the third refused", res)
	}
	if limit, running := h.Snapshot().ParallelChildren(h.Snapshot().Job(nil, JobKey{DefaultNamespace, plans[2].JobID})); limit != 2 || running != 2 {
		t.Errorf("%d of %d run", running, limit)
	}
	h.ends(plans[0].Place[0])
	again := *plans[2].Place[0]
	again.ID = h.id()
	if res := h.must(&ApplyPlans{Plans: []*Plan{{EvalID: plans[2].EvalID, Namespace: DefaultNamespace, JobID: plans[2].JobID, Place: []*Allocation{&again}}}}); len(res.Plans[0].Refused) != 0 {
		t.Errorf("refused though a sibling has ended: %+v", res)
	}
}

// randomTenants changes namespaces and quotas, whatever uses them.
func randomTenants(r *rand.Rand) Command {
	name := fmt.Sprintf("team-%d", r.IntN(3))
	switch r.IntN(8) {
	case 0, 1, 2:
		n := &Namespace{Name: name, Meta: map[string]string{}}
		if r.IntN(3) > 0 {
			n.Quota = fmt.Sprintf("team-%d", r.IntN(3))
			if r.IntN(2) == 0 {
				n.Meta[MetaCohort] = "all"
			}
		}
		return &UpsertNamespaces{Namespaces: []*Namespace{n}}
	case 3:
		return &DeleteNamespaces{Names: []string{name}}
	case 4:
		return &DeleteQuotas{Names: []string{name}}
	}
	q := gpuQuota(name, r.Int64N(4))
	q.Limits[0].CPU = limit(r.Int64N(500) - 100)
	return &UpsertQuotas{Quotas: []*Quota{q}}
}
