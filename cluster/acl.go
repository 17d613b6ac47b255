package cluster

// Tables and entries of access control.
const (
	TableACLPolicies = "acl_policies"
	TableACLTokens   = "acl_tokens"

	// IndexACLBootstrap is an entry of the index table that is no table: the log
	// index at which access control was bootstrapped.
	IndexACLBootstrap = "acl_bootstrap"
)

// Types of tokens.
const (
	ACLTokenClient     = "client"     // may do what its policies say
	ACLTokenManagement = "management" // may do everything
)

// ACLAnonymousPolicy is the policy of requests without a token.
const ACLAnonymousPolicy = "anonymous"

// ACLPolicy is a named set of rules in the language of package acl, which the
// state keeps as text and does not read.
type ACLPolicy struct {
	Name        string
	Description string
	Rules       string
	CreateIndex uint64
	ModifyIndex uint64
}

// ACLToken says who a request comes from. The secret itself is not kept: log,
// state and snapshots, which travel, hold its SHA-256 only.
type ACLToken struct {
	AccessorID     string // UUID, public
	SecretHash     string // SHA-256 of the secret, 64 hex digits
	Name           string
	Type           string   // client or management
	Policies       []string // by name; one that is not there gives nothing
	Global         bool
	CreateTime     int64 // unix nanoseconds; 0 in a command: the command's
	ExpirationTime int64 // unix nanoseconds; 0: never
	ExpirationTTL  int64 // as asked for, nanoseconds
	CreateIndex    uint64
	ModifyIndex    uint64
}

// Expired says whether the token was to end by now (unix nanoseconds).
func (t *ACLToken) Expired(now int64) bool { return t.ExpirationTime != 0 && t.ExpirationTime <= now }

// BootstrapACL makes the first management token. It works once; again only
// with ResetIndex, the index at which it worked before.
type BootstrapACL struct {
	Stamp
	Token      *ACLToken
	ResetIndex uint64
}

// UpsertACLPolicies creates or replaces policies.
type UpsertACLPolicies struct {
	Stamp
	Policies []*ACLPolicy
}

// DeleteACLPolicies removes policies; unknown names are no error. Tokens that
// name them lose what they gave.
type DeleteACLPolicies struct {
	Stamp
	Names []string
}

// UpsertACLTokens creates tokens, those with a SecretHash, and updates name, type
// and policies of existing ones, those without.
type UpsertACLTokens struct {
	Stamp
	Tokens []*ACLToken
}

// DeleteACLTokens removes tokens. With OnlyExpired those that are gone already or
// have not expired by the command's time are passed over, otherwise an unknown
// one refuses the command.
type DeleteACLTokens struct {
	Stamp
	AccessorIDs []string
	OnlyExpired bool
}

func (*BootstrapACL) kind() Kind      { return KindBootstrapACL }
func (*UpsertACLPolicies) kind() Kind { return KindUpsertACLPolicies }
func (*DeleteACLPolicies) kind() Kind { return KindDeleteACLPolicies }
func (*UpsertACLTokens) kind() Kind   { return KindUpsertACLTokens }
func (*DeleteACLTokens) kind() Kind   { return KindDeleteACLTokens }

var aclPolicyTable = &Table{
	Name: TableACLPolicies, Record: 11, New: func() any { return new(ACLPolicy) },
	key: func(v any) string { return v.(*ACLPolicy).Name },
}

var aclTokenTable = &Table{
	Name: TableACLTokens, Record: 12, New: func() any { return new(ACLToken) },
	key: func(v any) string { return v.(*ACLToken).AccessorID },
	by: map[string]func(any) string{
		"secret": func(v any) string { return v.(*ACLToken).SecretHash },
		"expires": func(v any) string {
			if t := v.(*ACLToken); t.ExpirationTime != 0 {
				return seq(uint64(t.ExpirationTime))
			}
			return ""
		},
	},
}

// ACLPolicy returns a policy by name.
func (s *Snapshot) ACLPolicy(ws WatchSet, name string) *ACLPolicy {
	return first[ACLPolicy](s.txn, ws, TableACLPolicies, "id", name)
}

// ACLPolicies returns the policies whose name begins with prefix, by name.
func (s *Snapshot) ACLPolicies(ws WatchSet, prefix string) []*ACLPolicy {
	return list[ACLPolicy](s.txn, ws, TableACLPolicies, "id_prefix", prefix)
}

// ACLToken returns a token by its accessor ID.
func (s *Snapshot) ACLToken(ws WatchSet, accessorID string) *ACLToken {
	return first[ACLToken](s.txn, ws, TableACLTokens, "id", accessorID)
}

// ACLTokenBySecret returns the token of a secret by the secret's SHA-256 in hex.
// It may have expired.
func (s *Snapshot) ACLTokenBySecret(ws WatchSet, hash string) *ACLToken {
	return first[ACLToken](s.txn, ws, TableACLTokens, "secret", hash)
}

// ACLTokens returns the tokens whose accessor ID begins with prefix, by accessor ID.
func (s *Snapshot) ACLTokens(ws WatchSet, prefix string) []*ACLToken {
	return list[ACLToken](s.txn, ws, TableACLTokens, "id_prefix", prefix)
}

// ExpiredACLTokens returns at most n tokens that have expired by now (unix
// nanoseconds), the earliest first.
func (s *Snapshot) ExpiredACLTokens(now int64, n int) []*ACLToken {
	var out []*ACLToken
	each(s.txn, func(t *ACLToken) bool {
		if len(out) == n || !t.Expired(now) {
			return false
		}
		out = append(out, t)
		return true
	}, TableACLTokens, "expires_prefix", "")
	return out
}

// ACLBootstrapIndex is the log index at which access control was bootstrapped, 0
// for never.
func (s *Snapshot) ACLBootstrapIndex(ws WatchSet) uint64 { return s.Index(ws, IndexACLBootstrap) }
