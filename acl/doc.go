// Package acl decides: may this identity do this? It reads policies in Nomad's
// policy language (https://developer.hashicorp.com/nomad/docs/other-specifications/acl-policy)
// and compiles those of a token into an ACL, whose Allow is the one decision.
//
// A policy is HCL of blocks, or the same as JSON:
//
//	namespace "prod-*" {
//	  policy       = "read"                  # read, write, scale or deny
//	  capabilities = ["submit-job"]
//	  variables {
//	    path "apps/*" { capabilities = ["read", "list"] }   # write, read, list, destroy, deny
//	  }
//	}
//	node_pool "gpu-*" { policy = "read" }    # read, write, deny; capabilities read, write, delete, deny
//	host_volume "data" { policy = "write" }  # read, write, deny; capabilities mount-readonly, mount-readwrite, deny
//	model "fashion-*" {                      # ours, not Nomad's
//	  policy       = "read"                  # read, write (= read, infer, push, alias) or deny
//	  capabilities = ["infer"]
//	}
//	node     { policy = "read" }             # likewise agent, operator, quota: read, write or deny
//	plugin   { policy = "list" }             # list, read or deny
//
// Names are globs in which * stands for any text. Of the globs that match a name
// only one counts: the name itself if a rule spells it out, else the one with the
// most characters besides its stars; of equally long ones one that denies, else the
// last by name, as b-* before *-b. Rules for the very same glob add up, over all policies of a token,
// and one of them that denies undoes the others. What no rule allows is denied.
//
// The package reads no clock and keeps no state besides Cache. Unlike Nomad it
// takes a misspelt attribute, a second label or a second node block for the
// mistake that it is.
package acl
