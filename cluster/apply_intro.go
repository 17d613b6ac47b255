package cluster

import "regexp"

// enrolledName is what a certificate can carry as a name.
var enrolledName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}$`)

func introRole(role string) bool { return role == RoleNode || role == RoleGateway }

func (t *tx) createIntroToken(c *CreateIntroToken) *Error {
	k := c.Token
	switch {
	case k == nil:
		return Errorf(CodeInvalid, "introduction token is missing")
	case !uuidRe.MatchString(k.ID) || !secretHashRe.MatchString(k.SecretHash):
		return Errorf(CodeInvalid, "introduction token: its ID is no UUID, or the hash of its secret no SHA-256 in hex")
	case !introRole(k.Role):
		return Errorf(CodeInvalid, "introduction token: role %q cannot be introduced: use %s or %s", k.Role, RoleNode, RoleGateway)
	case k.NodeName != "" && (k.Role != RoleNode || len(k.NodeName) > 255):
		return Errorf(CodeInvalid, "introduction token: a node name goes with role %s and has at most 255 bytes", RoleNode)
	case k.Uses < 0 || k.Uses > MaxIntroUses:
		return Errorf(CodeInvalid, "introduction token: %d uses: expected 0, for any number, to %d", k.Uses, MaxIntroUses)
	case k.ExpiresTime <= t.stamp.Time || k.ExpiresTime-t.stamp.Time > MaxIntroTTL:
		return Errorf(CodeInvalid, "introduction token: its life must be longer than nothing and at most 30 days")
	case t.IntroToken(nil, k.ID) != nil || t.IntroTokenBySecret(nil, k.SecretHash) != nil:
		return Errorf(CodeConflict, "introduction token: its ID or secret is in use")
	}
	kept := 0
	for _, old := range t.IntroTokens(nil, "") {
		if old.Expired(t.stamp.Time) {
			t.delete(TableIntroTokens, old)
		} else {
			kept++
		}
	}
	if kept >= MaxIntroTokens {
		return Errorf(CodeTooLarge, "there are %d introduction tokens already, which is the limit: delete some, or wait until they expire", kept)
	}
	k = Clone(k)
	k.Used, k.CreateTime, k.CreateIndex, k.ModifyIndex = 0, t.stamp.Time, t.index, t.index
	t.put(TableIntroTokens, k)
	return nil
}

func (t *tx) useIntroToken(c *UseIntroToken) *Error {
	if !introRole(c.Role) || !enrolledName.MatchString(c.Name) || !secretHashRe.MatchString(c.KeyHash) || len(c.NodeName) > 255 {
		return Errorf(CodeInvalid, "enrolment: role %.20q, name %.140q or the hash of its key cannot be in a certificate", c.Role, c.Name)
	}
	k := t.IntroTokenBySecret(nil, c.SecretHash)
	switch {
	case k == nil:
		return Errorf(CodeForbidden, "the introduction token is not known: it was never made here, or was deleted, or expired long ago; make one with `rxvision node intro`")
	case k.Expired(t.stamp.Time):
		return Errorf(CodeForbidden, "introduction token %s has expired; make another with `rxvision node intro`", k.ID)
	case k.Role != c.Role:
		return Errorf(CodeForbidden, "introduction token %s is for role %s, not %s", k.ID, k.Role, c.Role)
	case k.NodeName != "" && k.NodeName != c.NodeName:
		return Errorf(CodeForbidden, "introduction token %s is for node %q, not %q", k.ID, k.NodeName, c.NodeName)
	}
	old := t.Enrollment(nil, EnrollmentKey{c.Role, c.Name})
	switch {
	case old != nil && old.KeyHash == c.KeyHash && old.TokenID == k.ID:
		return nil // it was used for this
	case old != nil && old.KeyHash != c.KeyHash && !k.Replace:
		return Errorf(CodeConflict, "%s %s is enrolled with another key: purge it first, or make a token with -replace", c.Role, c.Name)
	case k.Uses > 0 && k.Used >= k.Uses:
		return Errorf(CodeForbidden, "introduction token %s has been used up; make another with `rxvision node intro`", k.ID)
	case old == nil && len(t.Enrollments(nil, "")) >= MaxEnrollments:
		return Errorf(CodeTooLarge, "%d nodes and gateways are enrolled, which is the limit: purge those that are gone", MaxEnrollments)
	}
	used := *k
	used.Used++
	used.ModifyIndex = t.index
	t.put(TableIntroTokens, &used)
	e := &Enrollment{
		Role: c.Role, Name: c.Name, NodeName: k.NodeName, KeyHash: c.KeyHash, TokenID: k.ID,
		CreateTime: t.stamp.Time, CreateIndex: t.index, ModifyIndex: t.index,
	}
	if old != nil {
		e.CreateTime, e.CreateIndex = old.CreateTime, old.CreateIndex
	}
	t.put(TableEnrollments, e)
	return nil
}

func (t *tx) deleteIntroTokens(c *DeleteIntroTokens) *Error {
	for _, id := range c.IDs {
		k := t.IntroToken(nil, id)
		if k == nil {
			return Errorf(CodeNotFound, "introduction token %.40q is not there", id)
		}
		t.delete(TableIntroTokens, k)
	}
	for _, key := range c.Enrollments {
		e := t.Enrollment(nil, key)
		if e == nil {
			return Errorf(CodeNotFound, "%.20s %.140q is not enrolled", key.Role, key.Name)
		}
		t.delete(TableEnrollments, e)
	}
	return nil
}

// expel ends the enrolment of a node that is purged: its certificates are worth
// nothing from now on.
func (t *tx) expel(nodeID string) {
	if e := t.Enrollment(nil, EnrollmentKey{RoleNode, nodeID}); e != nil {
		t.delete(TableEnrollments, e)
	}
}

// absent marks the enrolment of a node that is collected because it was down, or never
// came; present takes the mark off one that came back.
func (t *tx) absent(nodeID string)  { t.markAbsent(nodeID, t.stamp.Time) }
func (t *tx) present(nodeID string) { t.markAbsent(nodeID, 0) }

func (t *tx) markAbsent(nodeID string, at int64) {
	old := t.Enrollment(nil, EnrollmentKey{RoleNode, nodeID})
	if old == nil || (old.AbsentTime == 0) == (at == 0) {
		return
	}
	e := *old
	e.AbsentTime, e.ModifyIndex = at, t.index
	t.put(TableEnrollments, &e)
}

// reapEnrollments forgets the enrolments of nodes that did not come back.
func (t *tx) reapEnrollments() {
	for i, e := range list[Enrollment](t.txn, nil, TableEnrollments, "absent_prefix", "") {
		if i == maxReapedEnrollments || t.stamp.Time-e.AbsentTime < KeepEnrollment {
			return
		}
		t.delete(TableEnrollments, e)
	}
}

// checkIntro finds tokens that were used too often and enrolments that could not
// have been made.
func (s *Snapshot) checkIntro(high uint64, fault func(format string, args ...any)) {
	secrets, enrolled := map[string]string{}, map[string]int{}
	for _, e := range s.Enrollments(nil, "") {
		enrolled[e.TokenID]++
		if !introRole(e.Role) || !enrolledName.MatchString(e.Name) || !secretHashRe.MatchString(e.KeyHash) || e.ModifyIndex > high {
			fault("enrolment of %s %q with key %q at index %d of %d", e.Role, e.Name, e.KeyHash, e.ModifyIndex, high)
		}
	}
	for _, k := range s.IntroTokens(nil, "") {
		if other, ok := secrets[k.SecretHash]; ok {
			fault("introduction tokens %s and %s have one secret", k.ID, other)
		}
		secrets[k.SecretHash] = k.ID
		if k.Used < enrolled[k.ID] || k.Uses > 0 && k.Used > k.Uses || !secretHashRe.MatchString(k.SecretHash) || k.ModifyIndex > high {
			fault("introduction token %s: used %d times of %d for %d enrolments, index %d of %d", k.ID, k.Used, k.Uses, enrolled[k.ID], k.ModifyIndex, high)
		}
	}
}
