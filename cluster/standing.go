package cluster

import (
	"cmp"
	"slices"
)

// QuotaStanding says how the quota of a namespace stands and who uses it; nil for a namespace without one.
func (s *Snapshot) QuotaStanding(namespace string) *QuotaStanding {
	a := s.Allowance(namespace, nil)
	if a == nil {
		return nil
	}
	n := s.Namespace(nil, namespace)
	q := &QuotaStanding{Quota: a.Quota, Cohort: n.Cohort()}
	for _, l := range a.lines {
		q.Lines = append(q.Lines, &QuotaLine{Name: l.label, Whole: l.whole, Limit: l.most, Ceiling: l.ceiling, Used: l.used, Firm: l.firm})
	}
	users := s.QuotaNamespaces(nil, a.Quota)
	if q.Cohort != "" {
		for _, m := range list[Namespace](s.txn, nil, TableNamespaces, "cohort", q.Cohort) {
			if m.Quota != a.Quota {
				users = append(users, m)
			}
		}
	}
	for _, m := range users {
		u := s.Usage(nil, m.Name)
		user := &QuotaUser{Namespace: m.Name, Quota: m.Quota, Allocs: u.Allocs, Used: map[string]int64{}}
		for _, l := range a.lines {
			if held := l.of(&u.Total); held > 0 {
				user.Used[l.label] = held
			}
		}
		q.Namespaces = append(q.Namespaces, user)
	}
	slices.SortFunc(q.Namespaces, func(a, b *QuotaUser) int {
		return cmp.Or(cmp.Compare(b.Allocs, a.Allocs), cmp.Compare(a.Namespace, b.Namespace))
	})
	if n := len(q.Namespaces); n > MaxExplained {
		q.Namespaces, q.More = q.Namespaces[:MaxExplained], n-MaxExplained
	}
	return q
}
