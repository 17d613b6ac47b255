package sim

import (
	"fmt"

	"github.com/rxvision/rxvision/cluster"
)

// limit gives the namespace of all jobs a quota, changes one, or takes it from it.
func (u *user) limit(snap *cluster.Snapshot) cluster.Command {
	w := u.w
	name := fmt.Sprintf("quota-%d", w.rnd.IntN(2))
	switch spare := "spare"; {
	case w.chance(150):
		return &cluster.UpsertNamespaces{Namespaces: []*cluster.Namespace{{Name: spare}}}
	case snap.Namespace(nil, spare) != nil && w.chance(300):
		return &cluster.DeleteNamespaces{Names: []string{spare}}
	case w.chance(200):
		return &cluster.DeleteQuotas{Names: []string{name}}
	case snap.Quota(nil, name) != nil && w.chance(600):
		n := &cluster.Namespace{Name: cluster.DefaultNamespace}
		if w.chance(500) {
			n.Quota = name
		}
		return &cluster.UpsertNamespaces{Namespaces: []*cluster.Namespace{n}}
	}
	cpu, gpus := int64(500+w.rnd.IntN(4000)), int64(w.rnd.IntN(6))
	return &cluster.UpsertQuotas{Quotas: []*cluster.Quota{{Name: name, Limits: []*cluster.QuotaLimit{{
		Region: "global", CPU: &cpu, Devices: []*cluster.QuotaDevice{{Name: "nvidia/gpu", Count: gpus}},
	}}}}}
}

// checkQuota says what is wrong with usage behind a command, given what it was before: a command may leave
// a namespace over its quota, since that can become lower, but none may lead it further beyond.
func checkQuota(cmd cluster.Command, before, after *cluster.Snapshot) error {
	if _, plans := cmd.(*cluster.ApplyPlans); !plans {
		return nil
	}
	for _, n := range after.Namespaces(nil, "") {
		was := map[string]int64{}
		for _, b := range before.Borrowed(n.Name) {
			was[b.Name] = b.Amount
		}
		for _, b := range after.Borrowed(n.Name) {
			if b.Amount > was[b.Name] && n.Cohort() == "" {
				return fmt.Errorf("a plan brought namespace %s from %d to %d of %s beyond its quota", n.Name, was[b.Name], b.Amount, b.Name)
			}
		}
	}
	return nil
}
