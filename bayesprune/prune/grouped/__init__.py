"""Convolutions whose channels fall into groups: which ones read which, and real grouped convolutions."""
