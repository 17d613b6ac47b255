package cluster

import (
	"slices"
	"strings"
)

func tenantFaults(what, name string, faults []string) *Error {
	if len(faults) == 0 {
		return nil
	}
	return Errorf(CodeInvalid, "%s %.200q: %s", what, name, strings.Join(faults, "\n"))
}

func (t *tx) upsertNamespaces(c *UpsertNamespaces) *Error {
	for _, n := range c.Namespaces {
		if n == nil {
			return Errorf(CodeInvalid, "a namespace is missing")
		}
		if refused := tenantFaults("namespace", n.Name, n.Faults()); refused != nil {
			return refused
		}
		if n.Quota != "" && t.Quota(nil, n.Quota) == nil {
			return Errorf(CodeInvalid, "namespace %q using non-existent quota %q", n.Name, n.Quota)
		}
		for _, other := range t.QuotaNamespaces(nil, n.Quota) {
			if n.Quota != "" && other.Name != n.Name && (n.Cohort() != "" || other.Cohort() != "") {
				return Errorf(CodeInvalid, "namespaces %q and %q cannot share quota %q: a namespace of a cohort needs one of its own", n.Name, other.Name, n.Quota)
			}
		}
		n.CreateIndex, n.ModifyIndex = t.index, t.index
		switch old := t.Namespace(nil, n.Name); {
		case old != nil:
			n.CreateIndex = old.CreateIndex
		case t.batch.rows(namespaceTable).ids.n >= MaxNamespaces:
			return Errorf(CodeTooLarge, "there are %d namespaces, which is the limit", MaxNamespaces)
		}
		t.put(TableNamespaces, n)
	}
	t.touch(IndexCapacity) // quota and cohort may leave more room
	return nil
}

func (t *tx) deleteNamespaces(c *DeleteNamespaces) *Error {
	for _, name := range c.Names {
		if name == DefaultNamespace {
			return Errorf(CodeInvalid, "can not delete default namespace")
		}
		n := t.Namespace(nil, name)
		if n == nil {
			return Errorf(CodeNotFound, "namespace %q not found", name)
		}
		if held := t.usageOf(name).Allocs; held > 0 {
			return Errorf(CodeInvalid, "namespace %q has %d allocations that have not ended", name, held)
		}
		var live []string
		jobs := t.Jobs(nil, name, "")
		for _, j := range jobs {
			if j.Status != JobStatusDead {
				live = append(live, j.ID)
			}
		}
		switch {
		case len(live) > 0:
			return Errorf(CodeInvalid, "namespace %q has %d non-terminal jobs: %s", name, len(live), strings.Join(live[:min(len(live), 10)], ", "))
		case len(jobs) > MaxDeadJobs:
			return Errorf(CodeInvalid, "namespace %q has %d dead jobs, and at most %d are forgotten at once: let them be collected first (nomad system gc)", name, len(jobs), MaxDeadJobs)
		}
		for _, j := range jobs {
			t.purgeJob(j)
		}
		t.delete(TableNamespaces, n)
	}
	t.touch(IndexCapacity) // what it lent, and what it had borrowed
	return nil
}

func (t *tx) upsertQuotas(c *UpsertQuotas) *Error {
	for _, q := range c.Quotas {
		if q == nil {
			return Errorf(CodeInvalid, "a quota is missing")
		}
		if refused := tenantFaults("quota", q.Name, q.Faults()); refused != nil {
			return refused
		}
		q.CreateIndex, q.ModifyIndex = t.index, t.index
		switch old := t.Quota(nil, q.Name); {
		case old != nil:
			q.CreateIndex = old.CreateIndex
		case t.batch.rows(quotaTable).ids.n >= MaxQuotas:
			return Errorf(CodeTooLarge, "there are %d quotas, which is the limit", MaxQuotas)
		}
		t.put(TableQuotas, q)
	}
	t.touch(IndexCapacity)
	return nil
}

func (t *tx) deleteQuotas(c *DeleteQuotas) *Error {
	for _, name := range c.Names {
		q := t.Quota(nil, name)
		if q == nil {
			return Errorf(CodeNotFound, "quota %q not found", name)
		}
		if users := t.QuotaNamespaces(nil, name); len(users) > 0 {
			var names []string
			for _, n := range users[:min(len(users), 10)] {
				names = append(names, n.Name)
			}
			return Errorf(CodeInvalid, "quota %q is used by %d namespaces: %s", name, len(users), strings.Join(names, ", "))
		}
		t.delete(TableQuotas, q)
	}
	return nil
}

// checkTenant refuses a job for what its namespace says.
func (t *tx) checkTenant(j *Job) *Error {
	if t.stamp.Rules < rulesEngine {
		if j.Namespace != DefaultNamespace {
			return Errorf(CodeInvalid, "nonexistent namespace %q: this version has the namespace %q only", j.Namespace, DefaultNamespace)
		}
		return nil
	}
	n := t.Namespace(nil, j.Namespace)
	if n == nil {
		return Errorf(CodeInvalid, "nonexistent namespace %q: create it first with `nomad namespace apply %s`", j.Namespace, j.Namespace)
	}
	if faults := n.refuses(j); faults != nil {
		return Errorf(CodeInvalid, "%s", strings.Join(faults, "\n"))
	}
	return nil
}

// grant says whether the quota of the job's namespace allows what a plan does on one node, and counts it in.
// What only takes less is always allowed.
func (t *tx) grant(a *Allowance, job *Job, place []*Allocation) bool {
	by := &Usage{}
	for _, p := range place {
		by.count(p.AllocatedResources, job.Preemptible(), 1)
		if old := t.Alloc(nil, p.ID); old != nil && old.Occupies() {
			by.count(old.AllocatedResources, t.preemptible(old), -1)
		}
	}
	if a.Exceeded(by) != nil {
		return false
	}
	a.Take(by)
	return true
}

// checkTenants finds jobs and namespaces that name what is not there.
func (s *Snapshot) checkTenants(high uint64, fault func(string, ...any)) {
	for _, n := range s.Namespaces(nil, "") {
		if faults := n.Faults(); faults != nil || n.ModifyIndex > max(high, 1) {
			fault("namespace %s: index %d of %d, %v", n.Name, n.ModifyIndex, high, faults)
		}
		if n.Quota != "" && s.Quota(nil, n.Quota) == nil {
			fault("namespace %s: its quota %s is not there", n.Name, n.Quota)
		}
		if shared := s.QuotaNamespaces(nil, n.Quota); n.Quota != "" && n.Cohort() != "" && len(shared) > 1 {
			fault("namespace %s of a cohort shares quota %s", n.Name, n.Quota)
		}
	}
	for _, q := range s.Quotas(nil, "") {
		if faults := q.Faults(); faults != nil || q.ModifyIndex > high {
			fault("quota %s: index %d of %d, %v", q.Name, q.ModifyIndex, high, faults)
		}
	}
	known := ""
	for _, j := range s.Jobs(nil, "*", "") {
		if j.Namespace != known && s.Namespace(nil, j.Namespace) == nil {
			fault("job %s is in namespace %s, which is not there", j.ID, j.Namespace)
		}
		known = j.Namespace
	}
	s.checkUsage(fault)
}

// withoutMemory gives resources without what older rules do not keep: how much memory a device has.
func withoutMemory(res *AllocatedResources) *AllocatedResources {
	if res == nil {
		return nil
	}
	for _, task := range res.Tasks {
		if slices.ContainsFunc(task.Devices, func(d *AllocatedDevice) bool { return d.MemoryMiB != 0 }) {
			res = Clone(res)
			for _, task := range res.Tasks {
				for _, d := range task.Devices {
					d.MemoryMiB = 0
				}
			}
			return res
		}
	}
	return res
}
