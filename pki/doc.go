// Package pki says who is who on the wire: the certificates of a region, the identities in them, and the TLS configurations
// that accept or expect a role.
//
// A region has one CA, whose key can stay off line, and below it a node CA, whose key the servers hold to sign what lives
// shortly: nodes, workers and enrolled gateways. A certificate names exactly one Identity by a URI of the form
// spiffe://ROLE.REGION.rxvision/NAME. The role is part of the host because that is what X.509 name constraints can restrict
// (RFC 5280, 4.2.1.10): the node CA may sign hosts of its three roles and no DNS name or address at all, so whoever steals
// its key can neither be a server nor serve HTTPS to an operator. crypto/x509 enforces that at each handshake.
//
// Material holds one process's CA, certificate and key, reloads them when their files change, and makes configurations that
// look at the newest of them. Holder keeps a certificate that is got over the wire and renewed. Authority signs.
//
// What these configurations do not do: revocation lists. A node or an enrolled gateway is cut off by forgetting its identity in the
// replicated state; a server or an operator by a new CA, for which CA files may hold several certificates.
package pki
