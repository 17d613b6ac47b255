package cluster

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Bounds of policies and tokens.
const (
	MaxACLDescription = 256       // of a policy, in bytes
	MaxACLRules       = 256 << 10 // of a policy, in bytes
	MaxACLTokenName   = 256       // in bytes
	MaxACLPolicies    = 256       // that one token may name
)

var (
	aclPolicyName = regexp.MustCompile(`^[a-zA-Z0-9-]{1,128}$`)
	uuidRe        = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	secretHashRe  = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// Faults lists all that is wrong with a policy besides its rules, which package
// acl reads.
func (p *ACLPolicy) Faults() []string {
	var faults []string
	if !aclPolicyName.MatchString(p.Name) {
		faults = append(faults, fmt.Sprintf("invalid name '%s'", p.Name))
	}
	if len(p.Description) > MaxACLDescription {
		faults = append(faults, fmt.Sprintf("description longer than %d", MaxACLDescription))
	}
	if len(p.Rules) > MaxACLRules {
		faults = append(faults, fmt.Sprintf("rules longer than %d", MaxACLRules))
	}
	return faults
}

// Faults lists all that is wrong with a token itself.
func (t *ACLToken) Faults() []string {
	var faults []string
	if len(t.Name) > MaxACLTokenName {
		faults = append(faults, "token name too long")
	}
	switch t.Type {
	case ACLTokenClient:
		if len(t.Policies) == 0 {
			faults = append(faults, "client token missing policies or roles")
		}
	case ACLTokenManagement:
		if len(t.Policies) > 0 {
			faults = append(faults, "management token cannot be associated with policies or roles")
		}
	default:
		faults = append(faults, "token type must be client or management")
	}
	if len(t.Policies) > MaxACLPolicies {
		faults = append(faults, fmt.Sprintf("token names more than %d policies", MaxACLPolicies))
	}
	if slices.ContainsFunc(t.Policies, func(name string) bool { return !aclPolicyName.MatchString(name) }) {
		faults = append(faults, "token names a policy by a name that no policy can have")
	}
	return faults
}

// aclFaults says what is wrong with the i-th of a command in Nomad's form.
func aclFaults(what string, i int, faults []string) *Error {
	if len(faults) == 0 {
		return nil
	}
	noun := "errors"
	if len(faults) == 1 {
		noun = "error"
	}
	return Errorf(CodeInvalid, "%s %d invalid: %d %s occurred:\n\t* %s\n\n", what, i, len(faults), noun, strings.Join(faults, "\n\t* "))
}

func (t *tx) bootstrapACL(c *BootstrapACL) *Error {
	if done := t.ACLBootstrapIndex(nil); done != 0 && c.ResetIndex != done {
		return Errorf(CodeInvalid, "ACL bootstrap already done (reset index: %d)", done)
	}
	if c.Token == nil || c.Token.Type != ACLTokenManagement {
		return Errorf(CodeInvalid, "the token to bootstrap with must be of type management")
	}
	if refused := t.createACLToken(0, c.Token); refused != nil {
		return refused
	}
	t.touch(IndexACLBootstrap)
	return nil
}

func (t *tx) upsertACLPolicies(c *UpsertACLPolicies) *Error {
	for i, p := range c.Policies {
		if p == nil {
			return Errorf(CodeInvalid, "policy %d is missing", i)
		}
		if refused := aclFaults("policy", i, p.Faults()); refused != nil {
			return refused
		}
		p = Clone(p)
		p.CreateIndex, p.ModifyIndex = t.index, t.index
		if old := t.ACLPolicy(nil, p.Name); old != nil {
			p.CreateIndex = old.CreateIndex
		}
		t.put(TableACLPolicies, p)
	}
	return nil
}

func (t *tx) deleteACLPolicies(c *DeleteACLPolicies) {
	for _, name := range c.Names {
		if p := t.ACLPolicy(nil, name); p != nil {
			t.delete(TableACLPolicies, p)
		}
	}
}

func (t *tx) upsertACLTokens(c *UpsertACLTokens) *Error {
	for i, token := range c.Tokens {
		var refused *Error
		switch {
		case token == nil:
			refused = Errorf(CodeInvalid, "token %d is missing", i)
		case token.SecretHash != "":
			refused = t.createACLToken(i, token)
		default:
			refused = t.updateACLToken(i, token)
		}
		if refused != nil {
			return refused
		}
	}
	return nil
}

func (t *tx) createACLToken(i int, token *ACLToken) *Error {
	faults := token.Faults()
	if !uuidRe.MatchString(token.AccessorID) {
		faults = append(faults, "accessor ID is no UUID")
	}
	if !secretHashRe.MatchString(token.SecretHash) {
		faults = append(faults, "secret hash is no SHA-256 in hex")
	}
	if token.ExpirationTime < 0 || token.Expired(t.stamp.Time) {
		faults = append(faults, "expiration time cannot be before create time")
	}
	if refused := aclFaults("token", i, faults); refused != nil {
		return refused
	}
	if t.ACLToken(nil, token.AccessorID) != nil || t.ACLTokenBySecret(nil, token.SecretHash) != nil {
		return Errorf(CodeInvalid, "token %d invalid: its accessor or secret ID is in use", i)
	}
	token = Clone(token)
	token.CreateIndex, token.ModifyIndex = t.index, t.index
	if token.CreateTime == 0 {
		token.CreateTime = t.stamp.Time
	}
	t.put(TableACLTokens, token)
	return nil
}

// updateACLToken changes what may be changed of a token; secret and life stay.
func (t *tx) updateACLToken(i int, token *ACLToken) *Error {
	old := t.ACLToken(nil, token.AccessorID)
	if old == nil {
		return Errorf(CodeInvalid, "cannot find token %s", token.AccessorID)
	}
	faults := token.Faults()
	if token.Global != old.Global {
		faults = append(faults, "cannot toggle global mode")
	}
	if refused := aclFaults("token", i, faults); refused != nil {
		return refused
	}
	n := Clone(old)
	n.Name, n.Type, n.Policies, n.ModifyIndex = token.Name, token.Type, slices.Clone(token.Policies), t.index
	t.put(TableACLTokens, n)
	return nil
}

func (t *tx) deleteACLTokens(c *DeleteACLTokens) *Error {
	var missing []string
	for _, id := range c.AccessorIDs {
		switch token := t.ACLToken(nil, id); {
		case token == nil:
			missing = append(missing, id)
		case !c.OnlyExpired || token.Expired(t.stamp.Time):
			t.delete(TableACLTokens, token)
		}
	}
	if len(missing) > 0 && !c.OnlyExpired {
		return Errorf(CodeInvalid, "Cannot delete nonexistent tokens: %s", strings.Join(missing, ", "))
	}
	return nil
}

// checkACL finds tokens that share a secret or could not have been made.
func (s *Snapshot) checkACL(high uint64, fault func(format string, args ...any)) {
	secrets := map[string]string{}
	for _, token := range s.ACLTokens(nil, "") {
		if other, ok := secrets[token.SecretHash]; ok {
			fault("ACL tokens %s and %s have one secret", token.AccessorID, other)
		}
		secrets[token.SecretHash] = token.AccessorID
		if !secretHashRe.MatchString(token.SecretHash) || token.Faults() != nil {
			fault("ACL token %s: secret hash %q, %v", token.AccessorID, token.SecretHash, token.Faults())
		}
		if token.ModifyIndex > high {
			fault("ACL token %s has index %d, beyond the state's %d", token.AccessorID, token.ModifyIndex, high)
		}
	}
	for _, p := range s.ACLPolicies(nil, "") {
		if faults := p.Faults(); faults != nil || p.ModifyIndex > high {
			fault("ACL policy %s: index %d of %d, %v", p.Name, p.ModifyIndex, high, faults)
		}
	}
}
